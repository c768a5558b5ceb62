// SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0
/* Who asks for pages back when the guest is short of memory. */

#include <linux/oom.h>
#include <linux/sched.h>
#include <linux/swap.h>

#include "aerostat.h"

/* The stock driver's: asked before notifiers of the default priority. */
#define AEROSTAT_OOM_PRIORITY	80

/* Whether the shrinker would offer pages, had it any number of them. */
bool aerostat_is_short(void)
{
	return aerostat_shrinkable(~0ULL, max(si_mem_available(), 0L), totalram_pages());
}

/* Gives back what was asked for. Runs where it may wait for the host. */
void aerostat_yield_work(struct work_struct *work)
{
	struct aerostat *vb = container_of(work, struct aerostat, yield_work);
	u64 wanted, pages = 0;

	aerostat_lock(vb);
	spin_lock_irq(&vb->stop_lock);
	wanted = vb->asked;
	WRITE_ONCE(vb->asked, 0);
	spin_unlock_irq(&vb->stop_lock);
	if (wanted && !vb->gone) {
		vb->yielded = true;
		pages = aerostat_yield(vb->core, vb, wanted) >> AEROSTAT_PAGE_SHIFT;
	}
	aerostat_unlock(vb);

	spin_lock_irq(&vb->stop_lock);
	/* Who asked meanwhile has had this answer, and is owed another one. */
	vb->asking = vb->asked;
	vb->asked_at = jiffies;
	WRITE_ONCE(vb->given_back, vb->given_back + pages);
	WRITE_ONCE(vb->answered, vb->answered + 1);
	spin_unlock_irq(&vb->stop_lock);
	wake_up_all(&vb->gave_back);
}

/* Has balloon pages given back. Waits until some were, or until an answer is owed for
 * so long: while a host is silent that is waited for once, and not by each who needs
 * memory. Returns the guest's pages that came back meanwhile.
 */
static u64 aerostat_ask_back(struct aerostat *vb, u64 wanted, unsigned long patience)
{
	unsigned long flags;
	u64 answered, before;
	long left;

	spin_lock_irqsave(&vb->stop_lock, flags);
	if (vb->stopping) {
		spin_unlock_irqrestore(&vb->stop_lock, flags);
		return 0;
	}
	if (!vb->asking)
		vb->asked_at = jiffies;
	vb->asking = true;
	/* No less than a page, so that it is seen. */
	WRITE_ONCE(vb->asked, max3(vb->asked, wanted, 1ULL));
	answered = vb->answered;
	before = vb->given_back;
	left = vb->asked_at + patience - jiffies;
	queue_work(vb->wq, &vb->yield_work);
	spin_unlock_irqrestore(&vb->stop_lock, flags);
	if (left > 0)
		wait_event_idle_timeout(vb->gave_back,
					READ_ONCE(vb->answered) != answered ||
					READ_ONCE(vb->stopping), left);
	return READ_ONCE(vb->given_back) - before;
}

/* What is held for the host alone goes first, at once and whole, and the balloon
 * stays. Returns the pages that came back of it, also where somebody else had taken
 * them back meanwhile; none where the host does not return it.
 */
static u64 aerostat_take_hold(struct aerostat *vb, bool wait_for_lock, unsigned long patience)
{
	u64 held = READ_ONCE(vb->held) >> AEROSTAT_PAGE_SHIFT;
	u64 pages = held ? aerostat_lose_hold(vb, wait_for_lock, patience) : 0;

	return pages || READ_ONCE(vb->held) ? pages : held;
}

/* Called with the lock that keeps all others out of the OOM killer. */
static int aerostat_oom_notify(struct notifier_block *nb, unsigned long dummy,
			       void *parm)
{
	struct aerostat *vb = container_of(nb, struct aerostat, oom_nb);
	u64 pages = aerostat_take_hold(vb, true, AEROSTAT_OOM_JIFFIES);
	unsigned long *freed = parm;

	/* The transport may allocate where the balloon is worked on. */
	if (!pages && aerostat_deflates_on_oom(vb) && READ_ONCE(vb->owner) != current)
		pages = aerostat_ask_back(vb, 0, AEROSTAT_OOM_JIFFIES);
	*freed += pages;
	return NOTIFY_OK;
}

/* The guest's pages that a shortage would bring back of the balloon and of what is
 * held beside.
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
	/* The kernel goes on with as many as it was once offered, which may have
	 * been the hold's.
	 */
	if (!aerostat_deflates_on_oom(vb) || !aerostat_offer(vb, 0))
		return SHRINK_STOP;
	/* A fill that runs into reclaim comes here. What is under way is not
	 * waited for.
	 */
	if (READ_ONCE(vb->owner))
		return SHRINK_STOP;
	freed = aerostat_ask_back(vb, (u64)sc->nr_to_scan << AEROSTAT_PAGE_SHIFT,
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

/* A hold yields whether or not the balloon does. */
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
