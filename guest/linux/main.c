// SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0
/*
 * Aerostat's virtio balloon driver: what only C can do of it.
 *
 * The decisions are in Rust. These files give the core pages, queues and the
 * configuration space, and call it when the host or the guest wants something.
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
MODULE_PARM_DESC(page_bitmap, "Send page bitmaps where the host takes them (default: Y)");

static bool requests = true;
module_param(requests, bool, 0444);
MODULE_PARM_DESC(requests, "Let the host ask for dropped caches and free pages (default: Y)");

/* Nobody who needs memory comes here: the holder may be waiting for the host. */
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
	/* What is held free for the host can as well be given to it. */
	if (retry_ms > 0 && aerostat_lose_hold(vb, true, AEROSTAT_RECLAIM_JIFFIES))
		retry_ms = 1;
	if (retry_ms > 0)
		aerostat_schedule(vb, msecs_to_jiffies(retry_ms));
}

/* What the kernel writes into pages that are freed, if it does. */
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

/* The host may want to know it before it leaves free pages out of anything. Where
 * there is none, the driver may not ask for the feature: it is not in its table.
 */
static void aerostat_tell_poison(struct virtio_device *vdev)
{
	u32 value;

	if (aerostat_poison(&value) && virtio_has_feature(vdev, VIRTIO_BALLOON_F_PAGE_POISON))
		virtio_cwrite_le(vdev, struct virtio_balloon_config, poison_val, &value);
}

/* From here on nobody begins to wait for the host, and who needs memory waits no
 * more: what they hold up (the list of OOM notifiers, reclaim) can be left.
 */
static void aerostat_begin_to_stop(struct aerostat *vb)
{
	spin_lock_irq(&vb->stop_lock);
	vb->stopping = true;
	spin_unlock_irq(&vb->stop_lock);
	wake_up_all(&vb->gave_back);
	if (vb->rq)
		aerostat_stopping_requests(vb->rq);
}

/* Leaves the device with an empty balloon, told properly where it listens. Who needs
 * memory looks at the queues, so nobody who does may come here any more.
 */
static void aerostat_stop(struct aerostat *vb)
{
	aerostat_begin_to_stop(vb);
	aerostat_unregister_pressure(vb);
	/* A restore has failed before. */
	if (!vb->started)
		return;
	cancel_delayed_work_sync(&vb->work);
	cancel_work_sync(&vb->yield_work);
	if (vb->rq)
		aerostat_stop_requests(vb->rq);

	aerostat_lock(vb);
	if (aerostat_empty(vb->core, vb))
		dev_warn(&vb->vdev->dev, "the device does not answer, taking the pages back\n");
	vb->gone = true;
	/* After a reset the device has no claim on what it was not told of. */
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
	aerostat_tell_poison(vb->vdev);
	virtio_device_ready(vb->vdev);
	/* Nobody asks for pages before there is all that it takes. */
	spin_lock_irq(&vb->stop_lock);
	vb->asked = 0;
	vb->asking = false;
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
	init_waitqueue_head(&vb->gave_back);
	spin_lock_init(&vb->stop_lock);
	mutex_init(&vb->lock);
	INIT_LIST_HEAD(&vb->withdrawn);
	for (i = 0; i <= AEROSTAT_MAX_ORDER; i++)
		INIT_LIST_HEAD(&vb->blocks[i]);
	vb->core = kzalloc(aerostat_core_bytes(), GFP_KERNEL);
	/* Unbound: a fill takes long enough for the scheduler to mind. Memory may
	 * be needed to run anything else.
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
 * A kernel that is started by this one (kexec) must not meet a device that goes on with
 * what this one gave it. Kernels since 6.15 reset all virtio devices by themselves. The
 * host is not asked: a reset needs no answer, and a shutdown must not wait for one.
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

/* Poison is added where there is one, Aerostat's own as the parameters say. */
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

	/* Not cleared while validating: User Mode Linux negotiates twice then. */
	if (aerostat_poison(&value))
		aerostat_features[aerostat_driver.feature_table_size++] =
			VIRTIO_BALLOON_F_PAGE_POISON;
	if (page_bitmap)
		aerostat_features[aerostat_driver.feature_table_size++] = AEROSTAT_F_PAGE_BITMAP;
	if (requests)
		aerostat_features[aerostat_driver.feature_table_size++] = AEROSTAT_F_REQUEST_VQ;
	err = register_virtio_driver(&aerostat_driver);
	/* Where the bus has its own, a driver's is neither called nor welcome. */
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
