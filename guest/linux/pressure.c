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

static u64 aerostat_take_back(struct aerostat *vb, u64 wanted)
{
	vb->yielded = true;
	return aerostat_yield(vb->core, vb, wanted) >> AEROSTAT_PAGE_SHIFT;
}

/* What is held for the host alone goes first, at once and whole, and the balloon
 * stays. Returns true when there was a hold, with the pages that came back of it,
 * also where somebody else had taken them back meanwhile.
 */
static bool aerostat_take_hold(struct aerostat *vb, bool wait_for_lock, u64 *pages)
{
	u64 held = READ_ONCE(vb->held) >> AEROSTAT_PAGE_SHIFT;

	*pages = held ? aerostat_lose_hold(vb, wait_for_lock) : 0;
	if (held && !*pages && !READ_ONCE(vb->held))
		*pages = held;
	return held;
}

static bool aerostat_trylock(struct aerostat *vb)
{
	if (!mutex_trylock(&vb->lock))
		return false;
	WRITE_ONCE(vb->owner, current);
	return true;
}

static int aerostat_oom_notify(struct notifier_block *nb, unsigned long dummy,
			       void *parm)
{
	struct aerostat *vb = container_of(nb, struct aerostat, oom_nb);
	unsigned long *freed = parm;
	u64 pages;

	if (aerostat_take_hold(vb, true, &pages)) {
		*freed += pages;
		return NOTIFY_OK;
	}
	/* The transport may allocate under our own lock. */
	if (!aerostat_deflates_on_oom(vb) || READ_ONCE(vb->owner) == current)
		return NOTIFY_OK;
	aerostat_lock(vb);
	if (!vb->gone)
		*freed += aerostat_take_back(vb, 0);
	aerostat_unlock(vb);
	return NOTIFY_OK;
}

static unsigned long aerostat_shrink_count(struct aerostat *vb)
{
	u64 held = READ_ONCE(vb->held);
	long available;

	if (aerostat_deflates_on_oom(vb))
		held += READ_ONCE(vb->pages);
	held >>= AEROSTAT_PAGE_SHIFT;
	available = held ? si_mem_available() : 0;
	return aerostat_shrinkable(held, max(available, 0L), totalram_pages());
}

static unsigned long aerostat_shrink_scan(struct aerostat *vb, struct shrink_control *sc)
{
	u64 freed = 0;

	if (aerostat_take_hold(vb, false, &freed))
		return freed ? freed : SHRINK_STOP;
	/* The kernel goes on with as many as it was once offered, which may have
	 * been the hold's.
	 */
	if (!aerostat_deflates_on_oom(vb) || !aerostat_shrink_count(vb))
		return SHRINK_STOP;
	/* A fill that runs into reclaim comes here with the lock held. */
	if (!aerostat_trylock(vb))
		return SHRINK_STOP;
	if (!vb->gone)
		freed = aerostat_take_back(vb, (u64)sc->nr_to_scan << AEROSTAT_PAGE_SHIFT);
	aerostat_unlock(vb);
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
	return err;
}

void aerostat_unregister_pressure(struct aerostat *vb)
{
	if (!aerostat_can_yield(vb))
		return;
	unregister_oom_notifier(&vb->oom_nb);
	aerostat_unregister_shrinker(vb);
}
