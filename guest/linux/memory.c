// SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0
/* The balloon's blocks: allocated pages on lists by order. */

#include <linux/gfp.h>
#include <linux/list.h>
#include <linux/sched.h>

#include "aerostat.h"

static u64 aerostat_pfn(struct page *page)
{
	return (u64)page_to_pfn(page) << AEROSTAT_PAGE_SHIFT;
}

/* page_private of a block: its order, and whether its pages are marked. */
#define AEROSTAT_BLOCK_ORDER	0xffUL
#define AEROSTAT_BLOCK_MARKED	0x100UL

void aerostat_keep_block(struct page *page, unsigned int order, struct list_head *list)
{
	set_page_private(page, order);
	list_add_tail(&page->lru, list);
}

/* Marks new blocks PageOffline: /proc/kcore, a crash kernel (makedumpfile) and
 * hibernation skip such pages. Readers check each page, so every page of a block must be
 * marked, which costs 5 ns a page. So blocks are marked after the inflate message. A
 * reader that comes before the mark makes the host allocate the pages that it reads, and
 * does no other harm. New blocks are at the end.
 */
void aerostat_mark_new(struct list_head *blocks)
{
	struct page *page;

	list_for_each_entry_reverse(page, blocks, lru) {
		unsigned long i, order = page_private(page);

		if (order & AEROSTAT_BLOCK_MARKED)
			break;
		for (i = 0; i < 1UL << order; i++)
			__SetPageOffline(page + i);
		set_page_private(page, order | AEROSTAT_BLOCK_MARKED);
		cond_resched();
	}
}

void aerostat_mark_balloon(struct aerostat *vb)
{
	unsigned int order;

	lockdep_assert_held(&vb->lock);
	for (order = 0; order <= AEROSTAT_MAX_ORDER; order++)
		aerostat_mark_new(&vb->blocks[order]);
}

unsigned int aerostat_leave_block(struct page *page)
{
	unsigned long i, kept = page_private(page);
	unsigned int order = kept & AEROSTAT_BLOCK_ORDER;

	list_del(&page->lru);
	set_page_private(page, 0);
	for (i = 0; kept & AEROSTAT_BLOCK_MARKED && i < 1UL << order; i++)
		__ClearPageOffline(page + i);
	return order;
}

/* Counts balloon_inflate and balloon_deflate of /proc/vmstat, in guest pages. */
static void aerostat_count(bool inflated, unsigned int order)
{
#ifdef CONFIG_MEMORY_BALLOON
	count_vm_events(inflated ? BALLOON_INFLATE : BALLOON_DEFLATE, 1L << order);
#endif
}

/* Without DEFLATE_ON_OOM ballooned pages do not count as the guest's memory. */
static void aerostat_adjust_managed(struct aerostat *vb, struct page *page,
				    long pages)
{
	if (!aerostat_deflates_on_oom(vb))
		adjust_managed_page_count(page, pages);
}

u64 aerostat_shim_allocate(struct aerostat *vb, u32 order)
{
	/* NORETRY also prevents the OOM killer. Not from movable zones, since the
	 * pages cannot be migrated.
	 */
	gfp_t gfp = GFP_HIGHUSER | __GFP_NORETRY | __GFP_NOMEMALLOC | __GFP_NOWARN;
	struct page *page;

	lockdep_assert_held(&vb->lock);
	cond_resched();
	if (order > AEROSTAT_MAX_ORDER || READ_ONCE(vb->yield_wanted) ||
	    READ_ONCE(vb->stopping))
		return AEROSTAT_NO_PFN;
	/* The shortage would make the balloon yield these pages again. */
	if (vb->starved && vb->yielded && aerostat_is_short())
		return AEROSTAT_NO_PFN;
	if (order)	/* not worth compaction or reclaim */
		gfp &= ~__GFP_RECLAIM;
	page = alloc_pages(gfp, order);
	if (!page)
		return AEROSTAT_NO_PFN;
	aerostat_adjust_managed(vb, page, -(1L << order));
	aerostat_count(true, order);
	aerostat_keep_block(page, order, &vb->blocks[order]);
	return aerostat_pfn(page);
}

u64 aerostat_shim_withdraw(struct aerostat *vb, u32 order)
{
	struct page *page;

	lockdep_assert_held(&vb->lock);
	if (order > AEROSTAT_MAX_ORDER || list_empty(&vb->blocks[order]))
		return AEROSTAT_NO_PFN;
	page = list_last_entry(&vb->blocks[order], struct page, lru);
	list_move_tail(&page->lru, &vb->withdrawn);
	return aerostat_pfn(page);
}

static void aerostat_free_list(struct aerostat *vb, struct list_head *list)
{
	struct page *page, *next;

	lockdep_assert_held(&vb->lock);
	list_for_each_entry_safe(page, next, list, lru) {
		unsigned int order = aerostat_leave_block(page);

		aerostat_count(false, order);
		aerostat_adjust_managed(vb, page, 1L << order);
		__free_pages(page, order);
		cond_resched();
	}
}

void aerostat_shim_free_withdrawn(struct aerostat *vb)
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
