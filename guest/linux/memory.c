// SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0
/* The balloon's blocks: taken from the page allocator, kept on lists by order. */

#include <linux/gfp.h>
#include <linux/list.h>
#include <linux/sched.h>

#include "aerostat.h"

static u64 aerostat_pfn(struct page *page)
{
	return (u64)page_to_pfn(page) << AEROSTAT_PAGE_SHIFT;
}

/* Nobody shall read what the host has or may have: /proc/kcore and a crash kernel
 * pass over such pages (makedumpfile), and hibernation does. Each page is looked
 * at by itself, so a block's head does not speak for the rest.
 */
void aerostat_mark_offline(struct page *page, unsigned int order)
{
	unsigned long i;

	for (i = 0; i < 1UL << order; i++)
		__SetPageOffline(page + i);
}

void aerostat_mark_online(struct page *page, unsigned int order)
{
	unsigned long i;

	for (i = 0; i < 1UL << order; i++)
		__ClearPageOffline(page + i);
}

/* balloon_inflate and balloon_deflate of /proc/vmstat, in the guest's pages. */
static void aerostat_count(bool inflated, unsigned int order)
{
#ifdef CONFIG_MEMORY_BALLOON
	count_vm_events(inflated ? BALLOON_INFLATE : BALLOON_DEFLATE, 1L << order);
#endif
}

/* A balloon that cannot yield is memory that the guest does not have. */
static void aerostat_adjust_managed(struct aerostat *vb, struct page *page,
				    long pages)
{
	if (!aerostat_deflates_on_oom(vb))
		adjust_managed_page_count(page, pages);
}

u64 aerostat_glue_allocate(struct aerostat *vb, u32 order)
{
	/* NORETRY also keeps the OOM killer out. Pages that cannot be moved
	 * have no place in movable zones.
	 */
	gfp_t gfp = GFP_HIGHUSER | __GFP_NORETRY | __GFP_NOMEMALLOC | __GFP_NOWARN;
	struct page *page;

	cond_resched();
	if (order > AEROSTAT_MAX_ORDER || READ_ONCE(vb->asked) ||
	    READ_ONCE(vb->stopping))
		return AEROSTAT_NO_PFN;
	/* What was taken back would have to be given back once more. */
	if (vb->starved && vb->yielded && aerostat_is_short())
		return AEROSTAT_NO_PFN;
	if (order)	/* not worth compaction or reclaim */
		gfp &= ~__GFP_RECLAIM;
	page = alloc_pages(gfp, order);
	if (!page)
		return AEROSTAT_NO_PFN;
	aerostat_adjust_managed(vb, page, -(1L << order));
	aerostat_mark_offline(page, order);
	aerostat_count(true, order);
	set_page_private(page, order);
	list_add_tail(&page->lru, &vb->blocks[order]);
	return aerostat_pfn(page);
}

u64 aerostat_glue_withdraw(struct aerostat *vb, u32 order)
{
	struct page *page;

	if (order > AEROSTAT_MAX_ORDER || list_empty(&vb->blocks[order]))
		return AEROSTAT_NO_PFN;
	page = list_last_entry(&vb->blocks[order], struct page, lru);
	list_move_tail(&page->lru, &vb->withdrawn);
	return aerostat_pfn(page);
}

static void aerostat_free_list(struct aerostat *vb, struct list_head *list)
{
	struct page *page, *next;

	list_for_each_entry_safe(page, next, list, lru) {
		unsigned int order = page_private(page);

		list_del(&page->lru);
		set_page_private(page, 0);
		aerostat_count(false, order);
		aerostat_mark_online(page, order);
		aerostat_adjust_managed(vb, page, 1L << order);
		__free_pages(page, order);
		cond_resched();
	}
}

void aerostat_glue_free_withdrawn(struct aerostat *vb)
{
	aerostat_free_list(vb, &vb->withdrawn);
}

void aerostat_free_all(struct aerostat *vb)
{
	unsigned int order;

	aerostat_free_list(vb, &vb->withdrawn);
	for (order = 0; order <= AEROSTAT_MAX_ORDER; order++)
		aerostat_free_list(vb, &vb->blocks[order]);
}
