// SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0
/*
 * Aerostat's virtio balloon driver: the C shim.
 *
 * The driver's logic is in Rust (core/). The shim provides pages, queues and the
 * configuration space, and calls the core on events of the host and the guest.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/poison.h>
#include <linux/slab.h>
#include <linux/virtio_ids.h>

#include "aerostat.h"

static bool page_bitmap = true;
module_param(page_bitmap, bool, 0444);
MODULE_PARM_DESC(page_bitmap, "Send page bitmaps if the host supports them (default: Y)");

static bool requests = true;
module_param(requests, bool, 0444);
MODULE_PARM_DESC(requests, "Accept requests of the host: drop caches, report or hold free pages (default: Y)");

/* Must not be called from reclaim: the holder may be waiting for the host. */
void aerostat_lock(struct aerostat *vb)
{
	mutex_lock(&vb->lock);
	WRITE_ONCE(vb->owner, current);
}

void aerostat_unlock(struct aerostat *vb)
{
	WRITE_ONCE(vb->owner, NULL);
	mutex_unlock(&vb->lock);
}

void aerostat_shim_bug(const char *file, size_t file_bytes, u32 line)
{
	pr_emerg("panic at %.*s:%u\n", (int)file_bytes, file, line);
	BUG();
}

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

	aerostat_lock(vb);
	start = ktime_get_ns();
	retry_ms = vb->gone ? 0 : aerostat_run(vb->core, vb);
	vb->run_ns += ktime_get_ns() - start;
	aerostat_mark_balloon(vb);
	if (retry_ms < 0)
		dev_err(&vb->vdev->dev, "the device does not answer, the balloon stays at %llu pages\n",
			vb->pages);
	else if (retry_ms && !vb->starved)
		dev_info(&vb->vdev->dev, "no more memory to give at %llu pages, will try again\n",
			 vb->pages);
	vb->starved = retry_ms > 0;
	if (!vb->starved)
		vb->yielded = false;
	aerostat_unlock(vb);
	/* Inflate with the pages of the hold. */
	if (retry_ms > 0 && aerostat_lose_hold(vb, true, AEROSTAT_RECLAIM_JIFFIES))
		retry_ms = 1;
	if (retry_ms > 0)
		aerostat_schedule(vb, msecs_to_jiffies(retry_ms));
}

/* Returns the value with which the kernel fills freed pages, if it does. */
static bool aerostat_poison(u32 *value)
{
	if (want_init_on_free())
		*value = 0;
	else if (page_poisoning_enabled_static())
		memset(value, PAGE_POISON, sizeof(*value));
	else
		return false;
	return true;
}

/* The host needs the value before it skips free pages. Without a poison the feature is
 * not in the driver's table.
 */
static void aerostat_write_poison(struct virtio_device *vdev)
{
	u32 value;

	if (aerostat_poison(&value) && virtio_has_feature(vdev, VIRTIO_BALLOON_F_PAGE_POISON))
		virtio_cwrite_le(vdev, struct virtio_balloon_config, poison_val, &value);
}

/* Ends all waits of tasks that need memory, and prevents new ones, so that the OOM
 * notifier and the shrinker can be unregistered.
 */
static void aerostat_begin_to_stop(struct aerostat *vb)
{
	spin_lock_irq(&vb->stop_lock);
	vb->stopping = true;
	spin_unlock_irq(&vb->stop_lock);
	wake_up_all(&vb->yield_done);
	if (vb->rq)
		aerostat_stopping_requests(vb->rq);
}

/* Stops the device with an empty balloon, deflated properly if the device answers. The
 * OOM notifier and the shrinker use the queues, so they are unregistered first.
 */
static void aerostat_stop(struct aerostat *vb)
{
	aerostat_begin_to_stop(vb);
	aerostat_unregister_pressure(vb);
	/* An earlier restore failed. */
	if (!vb->started)
		return;
	cancel_delayed_work_sync(&vb->work);
	cancel_work_sync(&vb->yield_work);
	if (vb->rq)
		aerostat_stop_requests(vb->rq);

	aerostat_lock(vb);
	if (aerostat_empty(vb->core, vb))
		dev_warn(&vb->vdev->dev, "the device does not answer, freeing the pages after a reset\n");
	vb->gone = true;
	/* After a reset the device has no claim on pages that were not deflated. */
	virtio_reset_device(vb->vdev);
	if (vb->rq)
		aerostat_forget_requests(vb->rq);
	aerostat_free_all(vb);
	aerostat_init(vb->core, vb->vdev->features, PAGE_SHIFT, AEROSTAT_MAX_ORDER);
	WRITE_ONCE(vb->pages, 0);
	vb->vdev->config->del_vqs(vb->vdev);
	vb->started = false;
	aerostat_unlock(vb);
}

static int aerostat_start(struct aerostat *vb)
{
	int err;

	if (vb->rq)
		aerostat_reset_requests(vb->rq);
	err = aerostat_find_vqs(vb);
	if (err)
		return err;
	aerostat_reset_slots(vb);
	vb->started = true;
	vb->gone = false;
	vb->starved = false;
	vb->yielded = false;
	aerostat_init(vb->core, vb->vdev->features, PAGE_SHIFT, AEROSTAT_MAX_ORDER);
	aerostat_write_poison(vb->vdev);
	virtio_device_ready(vb->vdev);
	/* Accept memory pressure only now that everything is set up. */
	spin_lock_irq(&vb->stop_lock);
	vb->yield_wanted = 0;
	vb->yield_pending = false;
	vb->stopping = false;
	spin_unlock_irq(&vb->stop_lock);
	if (vb->rq)
		aerostat_start_requests(vb->rq,
					vb->vqs[aerostat_request_vq(vb->vdev->features)]);
	err = aerostat_register_pressure(vb);
	if (err)
		aerostat_stop(vb);
	return err;
}

static void aerostat_free(struct aerostat *vb)
{
	aerostat_free_pool(vb);
	aerostat_free_requests(vb->rq);
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
	vb->stopping = true;
	INIT_DELAYED_WORK(&vb->work, aerostat_work);
	INIT_WORK(&vb->yield_work, aerostat_yield_work);
	init_waitqueue_head(&vb->acked);
	init_waitqueue_head(&vb->yield_done);
	spin_lock_init(&vb->stop_lock);
	mutex_init(&vb->lock);
	INIT_LIST_HEAD(&vb->withdrawn);
	for (i = 0; i <= AEROSTAT_MAX_ORDER; i++)
		INIT_LIST_HEAD(&vb->blocks[i]);
	vb->core = kzalloc(aerostat_core_bytes(), GFP_KERNEL);
	/* Unbound, since a fill takes long. WQ_MEM_RECLAIM, since yield_work frees
	 * memory.
	 */
	vb->wq = alloc_ordered_workqueue("aerostat_balloon", WQ_FREEZABLE | WQ_MEM_RECLAIM);
	if (aerostat_request_vq(vdev->features) >= 0)
		vb->rq = aerostat_alloc_requests(vb);
	if (!vb->core || !vb->wq || aerostat_alloc_pool(vb) ||
	    (aerostat_request_vq(vdev->features) >= 0 && !vb->rq)) {
		aerostat_free(vb);
		return NULL;
	}
	return vb;
}

static int aerostat_probe(struct virtio_device *vdev)
{
	struct aerostat *vb;
	int err;

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
	dev_info(&vdev->dev, "balloon ready: %s%s%s\n",
		 vb->answers ? "page bitmaps" : "page numbers",
		 aerostat_deflates_on_oom(vb) ? ", deflates on OOM" : "",
		 vb->rq ? ", takes requests" : "");
	aerostat_schedule(vb, 0);
	return 0;

out_free:
	aerostat_free(vb);
	return err;
}

static void aerostat_remove(struct virtio_device *vdev)
{
	struct aerostat *vb = vdev->priv;

	aerostat_stop(vb);
	aerostat_free(vb);
}

/*
 * A kernel started with kexec must not find a device that still uses this kernel's
 * buffers and balloon. Linux 6.15 resets all virtio devices itself. The balloon is not
 * deflated: a reset needs no answer, and a shutdown must not wait for one.
 */
static void aerostat_shutdown(struct device *dev)
{
	struct virtio_device *vdev = dev_to_virtio(dev);
	struct aerostat *vb = vdev->priv;

	aerostat_begin_to_stop(vb);
	virtio_break_device(vdev);
	wake_up(&vb->acked);
	cancel_delayed_work_sync(&vb->work);
	cancel_work_sync(&vb->yield_work);
	virtio_reset_device(vdev);
}

static int aerostat_validate(struct virtio_device *vdev)
{
	/* The host needs guest physical addresses, not DMA addresses. */
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
AEROSTAT_COUNTER(requests);
AEROSTAT_COUNTER(held);
AEROSTAT_COUNTER(holds_lost);

static struct attribute *aerostat_attrs[] = {
	&dev_attr_pages.attr,
	&dev_attr_messages.attr,
	&dev_attr_refused.attr,
	&dev_attr_run_ns.attr,
	&dev_attr_wait_ns.attr,
	&dev_attr_requests.attr,
	&dev_attr_held.attr,
	&dev_attr_holds_lost.attr,
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

/* PAGE_POISON is added if there is a poison, Aerostat's features by the parameters. */
static unsigned int aerostat_features[5] = {
	VIRTIO_BALLOON_F_MUST_TELL_HOST,
	VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
};

static struct virtio_driver aerostat_driver = {
	.driver.name = KBUILD_MODNAME,
	.driver.owner = THIS_MODULE,
	.driver.dev_groups = aerostat_groups,
	.id_table = aerostat_ids,
	.feature_table = aerostat_features,
	.feature_table_size = 2,
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
	u32 value;
	int err;

	/* Not cleared in validate: User Mode Linux would negotiate twice. */
	if (aerostat_poison(&value))
		aerostat_features[aerostat_driver.feature_table_size++] =
			VIRTIO_BALLOON_F_PAGE_POISON;
	if (page_bitmap)
		aerostat_features[aerostat_driver.feature_table_size++] = AEROSTAT_F_PAGE_BITMAP;
	if (requests)
		aerostat_features[aerostat_driver.feature_table_size++] = AEROSTAT_F_REQUEST_VQ;
	err = register_virtio_driver(&aerostat_driver);
	/* If the bus has its own shutdown, a driver's is not called and causes a warning. */
	if (!err && !aerostat_driver.driver.bus->shutdown)
		aerostat_driver.driver.shutdown = aerostat_shutdown;
	return err;
}
module_init(aerostat_module_init);

static void __exit aerostat_module_exit(void)
{
	unregister_virtio_driver(&aerostat_driver);
}
module_exit(aerostat_module_exit);

MODULE_DESCRIPTION("Aerostat virtio balloon driver");
MODULE_LICENSE("GPL");
