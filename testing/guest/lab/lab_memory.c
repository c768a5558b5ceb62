// SPDX-License-Identifier: GPL-2.0
/*
 * Fragments a guest's memory, for Aerostat's tests and benchmarks.
 *
 * Writing a number of MiB to the parameter "fragment" allocates all memory except that many MiB in
 * blocks of 2 MiB, writes every byte, and frees all except one page in the middle of every second
 * block. Free memory then has a hole in every 4 MiB. Writing to the parameter "unpin", or
 * unloading, frees these pages too. The parameter "pinned_pages" is their number.
 */
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/sched.h>

#define BLOCK_ORDER 9
#define BLOCK_PAGES (1UL << BLOCK_ORDER)
/* Fails instead of pushing the guest into reclaim. */
#define BLOCK_FLAGS (GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN)
/* Not zero, so that the host cannot share the pages with a zero page. */
#define TOUCH_BYTE 0xa5

static LIST_HEAD(pinned);
static unsigned long pinned_pages;
static DEFINE_MUTEX(lock);

static void unpin_all(void)
{
	struct page *page, *next;

	list_for_each_entry_safe(page, next, &pinned, lru) {
		list_del(&page->lru);
		__free_page(page);
	}
	pinned_pages = 0;
}

/* Keeps the middle page of a block and frees the others one by one. */
static void pin_middle(struct page *block)
{
	unsigned long i;

	split_page(block, BLOCK_ORDER);
	for (i = 0; i < BLOCK_PAGES; i++)
		if (i != BLOCK_PAGES / 2)
			__free_page(block + i);
	list_add(&block[BLOCK_PAGES / 2].lru, &pinned);
	pinned_pages++;
}

static int fragment_set(const char *text, const struct kernel_param *param)
{
	unsigned long leave_mib, leave_pages;
	struct page *block, *next;
	LIST_HEAD(blocks);
	int err = kstrtoul(text, 0, &leave_mib);

	if (err)
		return err;
	leave_pages = leave_mib << (20 - PAGE_SHIFT);
	mutex_lock(&lock);
	unpin_all();
	while (global_zone_page_state(NR_FREE_PAGES) > leave_pages + BLOCK_PAGES) {
		block = alloc_pages(BLOCK_FLAGS, BLOCK_ORDER);
		if (!block)
			break;
		memset(page_address(block), TOUCH_BYTE, BLOCK_PAGES << PAGE_SHIFT);
		list_add(&block->lru, &blocks);
		cond_resched();
	}
	/* Only now: freed pages must not be allocated again. */
	list_for_each_entry_safe(block, next, &blocks, lru) {
		list_del(&block->lru);
		if ((page_to_pfn(block) >> BLOCK_ORDER) & 1)
			pin_middle(block);
		else
			__free_pages(block, BLOCK_ORDER);
	}
	mutex_unlock(&lock);
	pr_info("lab_memory: %lu pages pinned, %lu free\n", pinned_pages,
		global_zone_page_state(NR_FREE_PAGES));
	return 0;
}

static int unpin_set(const char *text, const struct kernel_param *param)
{
	mutex_lock(&lock);
	unpin_all();
	mutex_unlock(&lock);
	return 0;
}

static const struct kernel_param_ops fragment_ops = { .set = fragment_set };
static const struct kernel_param_ops unpin_ops = { .set = unpin_set };

module_param_cb(fragment, &fragment_ops, NULL, 0200);
MODULE_PARM_DESC(fragment, "Fragment all memory except this many MiB");
module_param_cb(unpin, &unpin_ops, NULL, 0200);
MODULE_PARM_DESC(unpin, "Free the pinned pages");
module_param(pinned_pages, ulong, 0400);
MODULE_PARM_DESC(pinned_pages, "Number of pinned pages");

static int __init lab_memory_init(void)
{
	return 0;
}
module_init(lab_memory_init);

static void __exit lab_memory_exit(void)
{
	unpin_all();
}
module_exit(lab_memory_exit);

MODULE_DESCRIPTION("Memory fragmentation for Aerostat's tests");
MODULE_LICENSE("GPL");
