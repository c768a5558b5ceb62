// SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0
/*
 * Aerostat's virtio balloon: what only C can do of it.
 *
 * The decisions are in Rust: this file gives the core pages, queues and the
 * configuration space, and calls it when the host or the guest wants something.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/oom.h>
#include <linux/shrinker.h>
#include <linux/slab.h>
#include <linux/version.h>
#include <linux/virtio.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "aerostat_core.h"

/* Aerostat's own feature bit: messages are page-bitmap records. */
#define AEROSTAT_F_PAGE_BITMAP	60

/* Inflate and deflate; the others are not negotiated. */
#define AEROSTAT_VQS		2

/* Memory for messages: 64 KiB, in pages of their own since a high order may
 * not be had, and never static since UML maps no .bss to devices.
 */
#define AEROSTAT_POOL_PAGES	16
#define AEROSTAT_BITMAP_BYTES	4096u
#define AEROSTAT_PFNS_BYTES	1024u
#define AEROSTAT_MAX_SLOTS	(AEROSTAT_POOL_PAGES * 4096u / AEROSTAT_PFNS_BYTES)

/* While waiting, look this often whether the device has died. */
#define AEROSTAT_LOOK_JIFFIES	HZ
/* Looks granted to a silent device once the driver has to leave it. */
#define AEROSTAT_LAST_LOOKS	5

/* Before the balloon of last resort, after those who drop caches. */
#define AEROSTAT_OOM_PRIORITY	80

#if defined(MAX_PAGE_ORDER)
#define AEROSTAT_MAX_ORDER	MAX_PAGE_ORDER
#elif LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
#define AEROSTAT_MAX_ORDER	MAX_ORDER
#else
#define AEROSTAT_MAX_ORDER	(MAX_ORDER - 1)
#endif

struct aerostat {
	struct virtio_device *vdev;
	struct virtqueue *vqs[AEROSTAT_VQS];
	struct workqueue_struct *wq;
	struct delayed_work work;
	wait_queue_head_t acked;

	/* Guards stopping against a last config change. */
	spinlock_t stop_lock;
	bool stopping;
	/* Callers in need of the lock: whoever fills shall end soon. */
	atomic_t pressure;

	/* Guards everything below; owner is who holds it. */
	struct mutex lock;
	struct task_struct *owner;
	struct aerostat_core *core;
	bool gone;
	bool starved;

	/* The balloon's blocks by order, and those on their way out. */
	struct list_head blocks[AEROSTAT_MAX_ORDER + 1];
	struct list_head withdrawn;

	/* Message slots: bit set when the driver has it. */
	void *pool[AEROSTAT_POOL_PAGES];
	unsigned int slot_bytes;
	unsigned int in_flight;
	u64 idle;
	int current_slot;

	struct notifier_block oom_nb;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
	struct shrinker *shrinker;
#else
	struct shrinker shrinker;
#endif

	/* Read without the lock by sysfs and the shrinker. */
	u64 pages;
	u64 messages;
	u64 refused;
	u64 run_ns;
	u64 wait_ns;

	/* The host writes here. */
	__le32 status[AEROSTAT_MAX_SLOTS] ____cacheline_aligned;
};

static bool page_bitmap = true;
module_param(page_bitmap, bool, 0444);
MODULE_PARM_DESC(page_bitmap, "Send page bitmaps where the host takes them (default: Y)");

static void aerostat_lock(struct aerostat *vb)
{
	atomic_inc(&vb->pressure);
	mutex_lock(&vb->lock);
	atomic_dec(&vb->pressure);
	WRITE_ONCE(vb->owner, current);
}

static bool aerostat_trylock(struct aerostat *vb)
{
	if (!mutex_trylock(&vb->lock))
		return false;
	WRITE_ONCE(vb->owner, current);
	return true;
}

static void aerostat_unlock(struct aerostat *vb)
{
	WRITE_ONCE(vb->owner, NULL);
	mutex_unlock(&vb->lock);
}

static bool aerostat_deflates_on_oom(struct aerostat *vb)
{
	return virtio_has_feature(vb->vdev, VIRTIO_BALLOON_F_DEFLATE_ON_OOM);
}

/* Memory */

static u64 aerostat_pfn(struct page *page)
{
	return (u64)page_to_pfn(page) << (PAGE_SHIFT - VIRTIO_BALLOON_PFN_SHIFT);
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
	if (order > AEROSTAT_MAX_ORDER || atomic_read(&vb->pressure) ||
	    READ_ONCE(vb->stopping))
		return AEROSTAT_NO_PFN;
	if (order)	/* not worth compaction or reclaim */
		gfp &= ~__GFP_RECLAIM;
	page = alloc_pages(gfp, order);
	if (!page)
		return AEROSTAT_NO_PFN;
	aerostat_adjust_managed(vb, page, -(1L << order));
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
		aerostat_adjust_managed(vb, page, 1L << order);
		__free_pages(page, order);
		cond_resched();
	}
}

void aerostat_glue_free_withdrawn(struct aerostat *vb)
{
	aerostat_free_list(vb, &vb->withdrawn);
}

/* Queues */

static void aerostat_acked(struct virtqueue *vq)
{
	struct aerostat *vb = vq->vdev->priv;

	wake_up(&vb->acked);
}

static void aerostat_note_status(struct aerostat *vb, u32 status)
{
	const char *why = aerostat_refusal(status);

	if (!why)
		return;
	vb->refused++;
	dev_warn_ratelimited(&vb->vdev->dev, "the host refused a message: %s\n", why);
}

/* Takes back what the host has returned; true when that is enough. */
static bool aerostat_returned(struct aerostat *vb, struct virtqueue *vq,
			      unsigned int in_flight)
{
	unsigned int len;
	__le32 *status;

	while ((status = virtqueue_get_buf(vq, &len))) {
		if (aerostat_has_page_bitmap(vb->vdev->features))
			aerostat_note_status(vb, le32_to_cpu(*status));
		vb->idle |= BIT_ULL(status - vb->status);
		vb->in_flight--;
	}
	return vb->in_flight <= in_flight;
}

/* Notifies the host and waits until no more than in_flight messages are out. */
static int aerostat_wait(struct aerostat *vb, struct virtqueue *vq,
			 unsigned int in_flight)
{
	unsigned int looks = AEROSTAT_LAST_LOOKS;
	u64 start = ktime_get_ns();

	if (!vb->in_flight)
		return 0;
	if (!virtqueue_kick(vq))
		vb->gone = true;
	while (!vb->gone &&
	       !wait_event_idle_timeout(vb->acked,
					aerostat_returned(vb, vq, in_flight),
					AEROSTAT_LOOK_JIFFIES))
		vb->gone = virtqueue_is_broken(vq) ||
			   (READ_ONCE(vb->stopping) && !--looks);
	vb->wait_ns += ktime_get_ns() - start;
	return vb->gone ? -ENODEV : 0;
}

static u8 *aerostat_slot(struct aerostat *vb, unsigned int slot)
{
	unsigned int per_page = AEROSTAT_BITMAP_BYTES / vb->slot_bytes;

	return vb->pool[slot / per_page] + slot % per_page * vb->slot_bytes;
}

u8 *aerostat_glue_buffer(struct aerostat *vb, u32 vq, size_t *bytes)
{
	if (vb->gone || vq >= AEROSTAT_VQS)
		return NULL;
	if (vb->current_slot < 0) {
		if (!vb->idle && aerostat_wait(vb, vb->vqs[vq], vb->in_flight - 1))
			return NULL;
		vb->current_slot = __ffs64(vb->idle);
	}
	*bytes = vb->slot_bytes;
	return aerostat_slot(vb, vb->current_slot);
}

int aerostat_glue_post(struct aerostat *vb, u32 vq, size_t bytes)
{
	struct scatterlist out, in, *sgs[] = { &out, &in };
	bool answers = aerostat_has_page_bitmap(vb->vdev->features);
	unsigned int slot = vb->current_slot;
	int err;

	if (vb->gone || vq >= AEROSTAT_VQS || vb->current_slot < 0 ||
	    !bytes || bytes > vb->slot_bytes)
		return -EINVAL;
	sg_init_one(&out, aerostat_slot(vb, slot), bytes);
	vb->status[slot] = cpu_to_le32(~0u);
	sg_init_one(&in, &vb->status[slot], sizeof(vb->status[slot]));
	for (;;) {
		/* Never allocates from reserves or waits: this may be the way
		 * out of an OOM. A ring that has no room has messages in it.
		 */
		err = virtqueue_add_sgs(vb->vqs[vq], sgs, 1, answers, &vb->status[slot],
					GFP_NOWAIT | __GFP_NOWARN);
		if (err != -ENOSPC || !vb->in_flight)
			break;
		if (aerostat_wait(vb, vb->vqs[vq], vb->in_flight - 1))
			return -ENODEV;
	}
	if (err) {
		dev_err(&vb->vdev->dev, "no message can be sent: error %d\n", err);
		vb->gone = true;
		return err;
	}
	vb->idle &= ~BIT_ULL(slot);
	vb->current_slot = -1;
	vb->in_flight++;
	vb->messages++;
	return 0;
}

int aerostat_glue_tell_host(struct aerostat *vb, u32 vq)
{
	if (vb->gone || vq >= AEROSTAT_VQS)
		return -ENODEV;
	return aerostat_wait(vb, vb->vqs[vq], 0);
}

u32 aerostat_glue_num_pages(struct aerostat *vb)
{
	u32 pages = 0;

	if (!vb->gone)
		virtio_cread_le(vb->vdev, struct virtio_balloon_config, num_pages, &pages);
	return pages;
}

void aerostat_glue_set_actual(struct aerostat *vb, u32 pages)
{
	WRITE_ONCE(vb->pages, pages);
	if (!vb->gone)
		virtio_cwrite_le(vb->vdev, struct virtio_balloon_config, actual, &pages);
}

void aerostat_glue_bug(const char *file, size_t file_bytes, u32 line)
{
	pr_emerg("panic at %.*s:%u\n", (int)file_bytes, file, line);
	BUG();
}

/* Who calls the core */

static void aerostat_schedule(struct aerostat *vb, unsigned long delay)
{
	unsigned long flags;

	spin_lock_irqsave(&vb->stop_lock, flags);
	if (!vb->stopping)
		mod_delayed_work(vb->wq, &vb->work, delay);
	spin_unlock_irqrestore(&vb->stop_lock, flags);
}

static void aerostat_config_changed(struct virtio_device *vdev)
{
	aerostat_schedule(vdev->priv, 0);
}

static void aerostat_work(struct work_struct *work)
{
	struct aerostat *vb = container_of(work, struct aerostat, work.work);
	int retry_ms;
	u64 start;

	mutex_lock(&vb->lock);
	WRITE_ONCE(vb->owner, current);
	start = ktime_get_ns();
	retry_ms = vb->gone ? 0 : aerostat_run(vb->core, vb);
	vb->run_ns += ktime_get_ns() - start;
	if (retry_ms < 0)
		dev_err(&vb->vdev->dev, "the device does not answer, the balloon stays at %llu pages\n",
			vb->pages);
	else if (retry_ms && !vb->starved)
		dev_info(&vb->vdev->dev, "no more memory to give at %llu pages, will try again\n",
			 vb->pages);
	vb->starved = retry_ms > 0;
	aerostat_unlock(vb);
	if (retry_ms > 0)
		aerostat_schedule(vb, msecs_to_jiffies(retry_ms));
}

static int aerostat_oom_notify(struct notifier_block *nb, unsigned long dummy,
			       void *parm)
{
	struct aerostat *vb = container_of(nb, struct aerostat, oom_nb);
	unsigned long *freed = parm;

	/* The transport may allocate under our own lock. */
	if (READ_ONCE(vb->owner) == current)
		return NOTIFY_OK;
	aerostat_lock(vb);
	*freed += aerostat_yield(vb->core, vb, 0) >> (PAGE_SHIFT - VIRTIO_BALLOON_PFN_SHIFT);
	aerostat_unlock(vb);
	return NOTIFY_OK;
}

static unsigned long aerostat_shrink_count(struct aerostat *vb)
{
	u64 held = READ_ONCE(vb->pages) >> (PAGE_SHIFT - VIRTIO_BALLOON_PFN_SHIFT);
	long available = held ? si_mem_available() : 0;

	return aerostat_shrinkable(held, max(available, 0L), totalram_pages());
}

static unsigned long aerostat_shrink_scan(struct aerostat *vb, struct shrink_control *sc)
{
	u64 freed;

	/* A fill that runs into reclaim comes here with the lock held. */
	if (!aerostat_trylock(vb))
		return SHRINK_STOP;
	freed = aerostat_yield(vb->core, vb, (u64)sc->nr_to_scan <<
			       (PAGE_SHIFT - VIRTIO_BALLOON_PFN_SHIFT));
	aerostat_unlock(vb);
	return freed ? freed >> (PAGE_SHIFT - VIRTIO_BALLOON_PFN_SHIFT) : SHRINK_STOP;
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

/* Life of a device */

static int aerostat_find_vqs(struct aerostat *vb)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	struct virtqueue_info info[AEROSTAT_VQS] = {
		{ "inflate", aerostat_acked },
		{ "deflate", aerostat_acked },
	};

	return virtio_find_vqs(vb->vdev, AEROSTAT_VQS, vb->vqs, info, NULL);
#else
	vq_callback_t *callbacks[AEROSTAT_VQS] = { aerostat_acked, aerostat_acked };
	static const char * const names[AEROSTAT_VQS] = { "inflate", "deflate" };

	return virtio_find_vqs(vb->vdev, AEROSTAT_VQS, vb->vqs, callbacks, names, NULL);
#endif
}

static int aerostat_start(struct aerostat *vb)
{
	u64 features = vb->vdev->features;
	int err = aerostat_find_vqs(vb);

	if (err)
		return err;
	vb->slot_bytes = aerostat_has_page_bitmap(features) ? AEROSTAT_BITMAP_BYTES :
							     AEROSTAT_PFNS_BYTES;
	vb->idle = GENMASK_ULL(AEROSTAT_POOL_PAGES * 4096u / vb->slot_bytes - 1, 0);
	vb->in_flight = 0;
	vb->current_slot = -1;
	vb->gone = false;
	vb->stopping = false;
	aerostat_init(vb->core, features, PAGE_SHIFT, AEROSTAT_MAX_ORDER);
	virtio_device_ready(vb->vdev);
	return 0;
}

/* Leaves the device with an empty balloon, told properly where it listens. */
static void aerostat_stop(struct aerostat *vb)
{
	unsigned int order;

	spin_lock_irq(&vb->stop_lock);
	vb->stopping = true;
	spin_unlock_irq(&vb->stop_lock);
	cancel_delayed_work_sync(&vb->work);

	aerostat_lock(vb);
	if (aerostat_empty(vb->core, vb))
		dev_warn(&vb->vdev->dev, "the device does not answer, taking the pages back\n");
	vb->gone = true;
	/* After a reset the device has no claim on what it was not told of. */
	virtio_reset_device(vb->vdev);
	aerostat_free_list(vb, &vb->withdrawn);
	for (order = 0; order <= AEROSTAT_MAX_ORDER; order++)
		aerostat_free_list(vb, &vb->blocks[order]);
	aerostat_init(vb->core, vb->vdev->features, PAGE_SHIFT, AEROSTAT_MAX_ORDER);
	WRITE_ONCE(vb->pages, 0);
	vb->vdev->config->del_vqs(vb->vdev);
	aerostat_unlock(vb);
}

static void aerostat_free(struct aerostat *vb)
{
	unsigned int i;

	for (i = 0; i < AEROSTAT_POOL_PAGES; i++)
		kfree(vb->pool[i]);
	if (vb->wq)
		destroy_workqueue(vb->wq);
	kfree(vb->core);
	kfree(vb);
}

static struct aerostat *aerostat_alloc(struct virtio_device *vdev)
{
	struct aerostat *vb = kzalloc(sizeof(*vb), GFP_KERNEL);
	unsigned int i;

	if (!vb)
		return NULL;
	vb->vdev = vdev;
	INIT_DELAYED_WORK(&vb->work, aerostat_work);
	init_waitqueue_head(&vb->acked);
	spin_lock_init(&vb->stop_lock);
	mutex_init(&vb->lock);
	INIT_LIST_HEAD(&vb->withdrawn);
	for (i = 0; i <= AEROSTAT_MAX_ORDER; i++)
		INIT_LIST_HEAD(&vb->blocks[i]);
	vb->oom_nb.notifier_call = aerostat_oom_notify;
	vb->oom_nb.priority = AEROSTAT_OOM_PRIORITY;

	vb->core = kzalloc(aerostat_core_bytes(), GFP_KERNEL);
	/* Unbound: a fill takes long enough for the scheduler to mind. */
	vb->wq = alloc_ordered_workqueue("aerostat_balloon", WQ_FREEZABLE);
	if (!vb->core || !vb->wq)
		goto fail;
	for (i = 0; i < AEROSTAT_POOL_PAGES; i++) {
		vb->pool[i] = kzalloc(AEROSTAT_BITMAP_BYTES, GFP_KERNEL);
		if (!vb->pool[i])
			goto fail;
	}
	return vb;

fail:
	aerostat_free(vb);
	return NULL;
}

static int aerostat_probe(struct virtio_device *vdev)
{
	struct aerostat *vb;
	int err = -ENOMEM;

	if (!vdev->config->get) {
		dev_err(&vdev->dev, "the device has no configuration space\n");
		return -EINVAL;
	}
	vb = aerostat_alloc(vdev);
	if (!vb)
		return -ENOMEM;
	vdev->priv = vb;
	err = aerostat_start(vb);
	if (err)
		goto out_free;
	if (aerostat_deflates_on_oom(vb)) {
		err = aerostat_register_shrinker(vb);
		if (err)
			goto out_stop;
		err = register_oom_notifier(&vb->oom_nb);
		if (err)
			goto out_shrinker;
	}
	dev_info(&vdev->dev, "balloon ready: %s%s\n",
		 aerostat_has_page_bitmap(vdev->features) ? "page bitmaps" : "page numbers",
		 aerostat_deflates_on_oom(vb) ? ", deflates on OOM" : "");
	aerostat_schedule(vb, 0);
	return 0;

out_shrinker:
	aerostat_unregister_shrinker(vb);
out_stop:
	aerostat_stop(vb);
out_free:
	aerostat_free(vb);
	return err;
}

static void aerostat_remove(struct virtio_device *vdev)
{
	struct aerostat *vb = vdev->priv;

	if (aerostat_deflates_on_oom(vb)) {
		unregister_oom_notifier(&vb->oom_nb);
		aerostat_unregister_shrinker(vb);
	}
	aerostat_stop(vb);
	aerostat_free(vb);
}

static int aerostat_validate(struct virtio_device *vdev)
{
	/* The host needs guest physical addresses, whatever DMA would use. */
	__virtio_clear_bit(vdev, VIRTIO_F_ACCESS_PLATFORM);
	return 0;
}

#ifdef CONFIG_PM_SLEEP
static int aerostat_freeze(struct virtio_device *vdev)
{
	aerostat_stop(vdev->priv);
	return 0;
}

static int aerostat_restore(struct virtio_device *vdev)
{
	int err = aerostat_start(vdev->priv);

	if (!err)
		aerostat_schedule(vdev->priv, 0);
	return err;
}
#endif

#define AEROSTAT_COUNTER(_name)							\
static ssize_t _name##_show(struct device *dev, struct device_attribute *attr,	\
			    char *buf)						\
{										\
	struct aerostat *vb = dev_to_virtio(dev)->priv;				\
										\
	return sysfs_emit(buf, "%llu\n", READ_ONCE(vb->_name));			\
}										\
static DEVICE_ATTR_RO(_name)

AEROSTAT_COUNTER(pages);
AEROSTAT_COUNTER(messages);
AEROSTAT_COUNTER(refused);
AEROSTAT_COUNTER(run_ns);
AEROSTAT_COUNTER(wait_ns);

static struct attribute *aerostat_attrs[] = {
	&dev_attr_pages.attr,
	&dev_attr_messages.attr,
	&dev_attr_refused.attr,
	&dev_attr_run_ns.attr,
	&dev_attr_wait_ns.attr,
	NULL,
};

static const struct attribute_group aerostat_group = {
	.name = "balloon",
	.attrs = aerostat_attrs,
};

static const struct attribute_group *aerostat_groups[] = { &aerostat_group, NULL };

static const struct virtio_device_id aerostat_ids[] = {
	{ VIRTIO_ID_BALLOON, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, aerostat_ids);

/* The last one is left out when page_bitmap=N. */
static const unsigned int aerostat_features[] = {
	VIRTIO_BALLOON_F_MUST_TELL_HOST,
	VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
	AEROSTAT_F_PAGE_BITMAP,
};

static struct virtio_driver aerostat_driver = {
	.driver.name = KBUILD_MODNAME,
	.driver.owner = THIS_MODULE,
	.driver.dev_groups = aerostat_groups,
	.id_table = aerostat_ids,
	.feature_table = aerostat_features,
	.feature_table_size = ARRAY_SIZE(aerostat_features),
	.validate = aerostat_validate,
	.probe = aerostat_probe,
	.remove = aerostat_remove,
	.config_changed = aerostat_config_changed,
#ifdef CONFIG_PM_SLEEP
	.freeze = aerostat_freeze,
	.restore = aerostat_restore,
#endif
};

static int __init aerostat_module_init(void)
{
	if (!page_bitmap)
		aerostat_driver.feature_table_size--;
	return register_virtio_driver(&aerostat_driver);
}
module_init(aerostat_module_init);

static void __exit aerostat_module_exit(void)
{
	unregister_virtio_driver(&aerostat_driver);
}
module_exit(aerostat_module_exit);

MODULE_DESCRIPTION("Aerostat virtio balloon driver");
MODULE_LICENSE("GPL");
