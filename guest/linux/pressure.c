// SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0
/* Memory pressure: the OOM notifier and the shrinker. */

#include <linux/oom.h>
#include <linux/sched.h>
#include <linux/swap.h>

#include "aerostat.h"

/* As in the stock driver: called before notifiers of the default priority. */
#define AEROSTAT_OOM_PRIORITY	80

/* Returns true if the guest is short of memory, by the shrinker's criterion. */
bool aerostat_is_short(void)
{
	return aerostat_shrinkable(~0ULL, max(si_mem_available(), 0L), totalram_pages());
}

/* Deflates the requested pages. A work item, because it may wait for the host. */
void aerostat_yield_work(struct work_struct *work)
{
	struct aerostat *vb = container_of(work, struct aerostat, yield_work);
	u64 wanted, pages = 0;

	aerostat_lock(vb);
	spin_lock_irq(&vb->stop_lock);
	wanted = vb->yield_wanted;
	WRITE_ONCE(vb->yield_wanted, 0);
	spin_unlock_irq(&vb->stop_lock);
	if (wanted && !vb->gone) {
		vb->yielded = true;
		pages = aerostat_yield(vb->core, vb, wanted) >> AEROSTAT_PAGE_SHIFT;
	}
	aerostat_unlock(vb);

	spin_lock_irq(&vb->stop_lock);
	/* A request made meanwhile ends its wait with this run, and stays pending. */
	vb->yield_pending = vb->yield_wanted;
	vb->yield_since = jiffies;
	WRITE_ONCE(vb->yield_freed, vb->yield_freed + pages);
	WRITE_ONCE(vb->yield_runs, vb->yield_runs + 1);
	spin_unlock_irq(&vb->stop_lock);
	wake_up_all(&vb->yield_done);
}

/* Makes yield_work deflate pages, and waits until a run has ended or the oldest
 * pending request is older than timeout. So a silent host delays the guest once, and
 * not each task that needs memory. Returns the guest pages freed meanwhile.
 */
static u64 aerostat_request_yield(struct aerostat *vb, u64 wanted, unsigned long timeout)
{
	unsigned long flags;
	u64 runs, before;
	long left;

	spin_lock_irqsave(&vb->stop_lock, flags);
	if (vb->stopping) {
		spin_unlock_irqrestore(&vb->stop_lock, flags);
		return 0;
	}
	if (!vb->yield_pending)
		vb->yield_since = jiffies;
	vb->yield_pending = true;
	/* At least a page: 0 means that there is no request. */
	WRITE_ONCE(vb->yield_wanted, max3(vb->yield_wanted, wanted, 1ULL));
	runs = vb->yield_runs;
	before = vb->yield_freed;
	left = vb->yield_since + timeout - jiffies;
	queue_work(vb->wq, &vb->yield_work);
	spin_unlock_irqrestore(&vb->stop_lock, flags);
	if (left > 0)
		wait_event_idle_timeout(vb->yield_done,
					READ_ONCE(vb->yield_runs) != runs ||
					READ_ONCE(vb->stopping), left);
	return READ_ONCE(vb->yield_freed) - before;
}

/* Frees the whole hold, before the balloon is deflated. Returns the guest pages freed,
 * also if another task has freed them meanwhile; 0 if the host does not return the answer.
 */
static u64 aerostat_take_hold(struct aerostat *vb, bool wait_for_lock, unsigned long timeout)
{
	u64 held = READ_ONCE(vb->held) >> AEROSTAT_PAGE_SHIFT;
	u64 pages = held ? aerostat_lose_hold(vb, wait_for_lock, timeout) : 0;

	return pages || READ_ONCE(vb->held) ? pages : held;
}

/* Called with oom_lock held, so other tasks cannot enter the OOM killer. */
static int aerostat_oom_notify(struct notifier_block *nb, unsigned long dummy,
			       void *parm)
{
	struct aerostat *vb = container_of(nb, struct aerostat, oom_nb);
	u64 pages = aerostat_take_hold(vb, true, AEROSTAT_OOM_JIFFIES);
	unsigned long *freed = parm;

	/* The current task may own the lock: the transport may allocate under it. */
	if (!pages && aerostat_deflates_on_oom(vb) && READ_ONCE(vb->owner) != current)
		pages = aerostat_request_yield(vb, 0, AEROSTAT_OOM_JIFFIES);
	*freed += pages;
	return NOTIFY_OK;
}

/* Returns the guest pages that the current shortage would free from the balloon and from
 * held balloon pages of the hold.
 */
static unsigned long aerostat_offer(struct aerostat *vb, u64 held)
{
	long available;

	if (aerostat_deflates_on_oom(vb))
		held += READ_ONCE(vb->pages);
	held >>= AEROSTAT_PAGE_SHIFT;
	available = held ? si_mem_available() : 0;
	return aerostat_shrinkable(held, max(available, 0L), totalram_pages());
}

static unsigned long aerostat_shrink_count(struct aerostat *vb)
{
	return aerostat_offer(vb, READ_ONCE(vb->held));
}

static unsigned long aerostat_shrink_scan(struct aerostat *vb, struct shrink_control *sc)
{
	u64 freed = aerostat_take_hold(vb, false, AEROSTAT_RECLAIM_JIFFIES);

	if (freed)
		return freed;
	/* The kernel continues to scan the count that it was offered once, which may
	 * have been the hold's.
	 */
	if (!aerostat_deflates_on_oom(vb) || !aerostat_offer(vb, 0))
		return SHRINK_STOP;
	/* A fill that enters reclaim gets here. Do not wait for a run in progress. */
	if (READ_ONCE(vb->owner))
		return SHRINK_STOP;
	freed = aerostat_request_yield(vb, (u64)sc->nr_to_scan << AEROSTAT_PAGE_SHIFT,
				  AEROSTAT_RECLAIM_JIFFIES);
	return freed ? freed : SHRINK_STOP;
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
static unsigned long aerostat_count(struct shrinker *s, struct shrink_control *sc)
{
	return aerostat_shrink_count(s->private_data);
}

static unsigned long aerostat_scan(struct shrinker *s, struct shrink_control *sc)
{
	return aerostat_shrink_scan(s->private_data, sc);
}

static int aerostat_register_shrinker(struct aerostat *vb)
{
	vb->shrinker = shrinker_alloc(0, "aerostat-balloon:%s", dev_name(&vb->vdev->dev));
	if (!vb->shrinker)
		return -ENOMEM;
	vb->shrinker->count_objects = aerostat_count;
	vb->shrinker->scan_objects = aerostat_scan;
	vb->shrinker->private_data = vb;
	shrinker_register(vb->shrinker);
	return 0;
}

static void aerostat_unregister_shrinker(struct aerostat *vb)
{
	shrinker_free(vb->shrinker);
}
#else
static unsigned long aerostat_count(struct shrinker *s, struct shrink_control *sc)
{
	return aerostat_shrink_count(container_of(s, struct aerostat, shrinker));
}

static unsigned long aerostat_scan(struct shrinker *s, struct shrink_control *sc)
{
	return aerostat_shrink_scan(container_of(s, struct aerostat, shrinker), sc);
}

static int aerostat_register_shrinker(struct aerostat *vb)
{
	vb->shrinker.count_objects = aerostat_count;
	vb->shrinker.scan_objects = aerostat_scan;
	vb->shrinker.seeks = DEFAULT_SEEKS;
	return register_shrinker(&vb->shrinker, "aerostat-balloon:%s", dev_name(&vb->vdev->dev));
}

static void aerostat_unregister_shrinker(struct aerostat *vb)
{
	unregister_shrinker(&vb->shrinker);
}
#endif

/* A hold yields even without DEFLATE_ON_OOM. */
static bool aerostat_can_yield(struct aerostat *vb)
{
	return aerostat_deflates_on_oom(vb) || vb->rq;
}

int aerostat_register_pressure(struct aerostat *vb)
{
	int err;

	if (!aerostat_can_yield(vb))
		return 0;
	err = aerostat_register_shrinker(vb);
	if (err)
		return err;
	vb->oom_nb.notifier_call = aerostat_oom_notify;
	vb->oom_nb.priority = AEROSTAT_OOM_PRIORITY;
	err = register_oom_notifier(&vb->oom_nb);
	if (err)
		aerostat_unregister_shrinker(vb);
	vb->pressure_registered = !err;
	return err;
}

void aerostat_unregister_pressure(struct aerostat *vb)
{
	if (!vb->pressure_registered)
		return;
	unregister_oom_notifier(&vb->oom_nb);
	aerostat_unregister_shrinker(vb);
	vb->pressure_registered = false;
}
