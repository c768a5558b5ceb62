// SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0
/* The blocks of a hold, and its end when the guest needs them. */

#include <linux/gfp.h>
#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "requests.h"

/* How long the removal of the driver waits until the host returns "hold lost". */
#define AEROSTAT_REMOVE_JIFFIES	(5 * HZ)

void *aerostat_shim_hold_lock(struct aerostat *vb)
{
	cond_resched();
	mutex_lock(&vb->rq->hold_lock);
	return vb->rq->hold;
}

void aerostat_shim_hold_unlock(struct aerostat *vb)
{
	lockdep_assert_held(&vb->rq->hold_lock);
	WRITE_ONCE(vb->held, aerostat_hold_pages(vb->rq->hold));
	mutex_unlock(&vb->rq->hold_lock);
}

bool aerostat_shim_hold_take(struct aerostat *vb, u32 order)
{
	/* Only free pages: no reclaim, no compaction, no reserves. */
	gfp_t gfp = (GFP_HIGHUSER & ~__GFP_RECLAIM) | __GFP_NORETRY | __GFP_NOMEMALLOC |
		    __GFP_NOWARN;
	struct page *page;

	lockdep_assert_held(&vb->rq->hold_lock);
	if (order > AEROSTAT_MAX_ORDER)
		return false;
	page = alloc_pages(gfp, order);
	if (!page)
		return false;
	aerostat_keep_block(page, order, &vb->rq->taken[order]);
	return true;
}

u64 aerostat_shim_hold_name(struct aerostat *vb, u32 order)
{
	struct aerostat_requests *rq = vb->rq;
	struct page *page;

	lockdep_assert_held(&rq->hold_lock);
	if (order > AEROSTAT_MAX_ORDER || list_empty(&rq->taken[order]))
		return AEROSTAT_NO_PFN;
	page = list_first_entry(&rq->taken[order], struct page, lru);
	list_move_tail(&page->lru, &rq->named);
	return (u64)page_to_pfn(page) << AEROSTAT_PAGE_SHIFT;
}

static void aerostat_free_held(struct list_head *list)
{
	struct page *page, *next;

	list_for_each_entry_safe(page, next, list, lru) {
		unsigned int order = aerostat_leave_block(page);

		__free_pages(page, order);
		cond_resched();
	}
}

void aerostat_shim_hold_free(struct aerostat *vb)
{
	unsigned int order;

	lockdep_assert_held(&vb->rq->hold_lock);
	aerostat_free_held(&vb->rq->named);
	for (order = 0; order <= AEROSTAT_MAX_ORDER; order++)
		aerostat_free_held(&vb->rq->taken[order]);
}

/* Marks the named blocks, after the host has returned the answer. */
void aerostat_mark_hold(struct aerostat_requests *rq)
{
	aerostat_shim_hold_lock(rq->vb);
	aerostat_mark_new(&rq->named);
	aerostat_shim_hold_unlock(rq->vb);
}

/* Frees a lost hold once the host has returned "hold lost". A broken queue does not count:
 * a shutdown breaks the queues before it resets the device. Otherwise the hold is freed
 * after the reset.
 */
static u64 aerostat_free_lost(struct aerostat_requests *rq)
{
	struct aerostat *vb = rq->vb;
	u64 pages = 0;

	aerostat_shim_hold_lock(vb);
	if (aerostat_hold_is_losing(rq->hold) && READ_ONCE(rq->lost_back)) {
		aerostat_shim_hold_free(vb);
		pages = aerostat_hold_emptied(rq->hold);
		vb->holds_lost++;
	}
	aerostat_shim_hold_unlock(vb);
	if (pages)
		dev_info(&vb->vdev->dev, "took a hold of %llu pages back from the host\n", pages);
	return pages;
}

void aerostat_end_loss(struct aerostat_requests *rq)
{
	aerostat_free_lost(rq);
}

/* Sends "hold lost" unless it was sent already. Returns true while the host must still
 * return it.
 */
static bool aerostat_begin_loss(struct aerostat_requests *rq, bool wait_for_lock)
{
	u8 header[AEROSTAT_HEADER_BYTES];
	bool losing;
	u32 id;

	if (wait_for_lock)
		mutex_lock(&rq->hold_lock);
	else if (!mutex_trylock(&rq->hold_lock))
		return false;
	id = aerostat_hold_lose(rq->hold, ktime_get_ns(), header);
	if (id)
		aerostat_send_lost(rq, id, header);
	losing = aerostat_hold_is_losing(rq->hold);
	mutex_unlock(&rq->hold_lock);
	return losing;
}

/* Frees the hold under memory pressure. Returns the guest pages freed. A caller in reclaim,
 * which may hold file system locks, must not wait for hold_lock. Waits for the host for
 * at most timeout; after that the hold is freed when the host has returned "hold lost"
 * (aerostat_end_loss).
 */
u64 aerostat_lose_hold(struct aerostat *vb, bool wait_for_lock, unsigned long timeout)
{
	struct aerostat_requests *rq = vb->rq;
	long left;

	if (!rq || !aerostat_begin_loss(rq, wait_for_lock))
		return 0;
	left = READ_ONCE(rq->lost_at) + timeout - jiffies;
	if (left > 0)
		wait_event_idle_timeout(rq->returned,
					aerostat_loss_ended(rq) || READ_ONCE(rq->stopping),
					left);
	return aerostat_free_lost(rq) >> AEROSTAT_PAGE_SHIFT;
}

/* Ends the hold when the driver is removed. On a timeout aerostat_clear_hold() frees it after the reset. */
void aerostat_leave_hold(struct aerostat_requests *rq)
{
	if (!aerostat_begin_loss(rq, true))
		return;
	wait_event_idle_timeout(rq->returned, aerostat_loss_ended(rq),
				AEROSTAT_REMOVE_JIFFIES);
	aerostat_free_lost(rq);
}

void aerostat_clear_hold(struct aerostat_requests *rq)
{
	aerostat_shim_hold_lock(rq->vb);
	aerostat_shim_hold_free(rq->vb);
	aerostat_hold_emptied(rq->hold);
	aerostat_shim_hold_unlock(rq->vb);
}

int aerostat_alloc_hold(struct aerostat_requests *rq)
{
	unsigned int order;

	mutex_init(&rq->hold_lock);
	INIT_LIST_HEAD(&rq->named);
	for (order = 0; order <= AEROSTAT_MAX_ORDER; order++)
		INIT_LIST_HEAD(&rq->taken[order]);
	rq->hold = kzalloc(aerostat_hold_bytes(), GFP_KERNEL);
	if (!rq->hold)
		return -ENOMEM;
	aerostat_hold_init(rq->hold);
	return 0;
}
