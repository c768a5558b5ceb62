// SPDX-License-Identifier: GPL-2.0
/*
 * A balloon device inside the guest, for kernels whose VMMs have no request queue.
 *
 * It offers Aerostat's features, accepts every message, and sends the request that is written to
 * the parameter "ask": COMMAND ARGUMENT, or 5 ARGUMENT to cancel the request ARGUMENT. The
 * parameter "answer" shows the newest request: id, outcome of the newest answer, its four values,
 * pages reported, how many of these were in use when the answer arrived, and number of answers.
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/version.h>
#include <linux/virtio.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_ring.h>
#include <linux/workqueue.h>

#define QUEUES 3
#define REQUESTS 2
#define ENTRIES 64
#define CANCEL 5
#define FEATURES (BIT_ULL(VIRTIO_BALLOON_F_MUST_TELL_HOST) | BIT_ULL(VIRTIO_F_VERSION_1) | \
		  BIT_ULL(60) | BIT_ULL(61))

struct request { __le32 id, command; __le64 argument; };
struct answer { __le32 id, outcome; __le64 elapsed_ns, values[4]; };

static struct device *parent;
static struct virtio_device *device;
static struct virtqueue *queues[QUEUES];
static u16 seen[QUEUES];
static u8 status;
static struct virtio_balloon_config config;
static DEFINE_MUTEX(lock);

static u16 waiting[ENTRIES];
static unsigned int waiting_chains;
static u32 last_id;
static struct answer newest;
static u64 named_pages, used_pages, answers;

static void give_back(unsigned int q, u16 head, u32 bytes)
{
	const struct vring *vring = virtqueue_get_vring(queues[q]);
	u16 index = le16_to_cpu(vring->used->idx);

	vring->used->ring[index % vring->num].id = cpu_to_le32(head);
	vring->used->ring[index % vring->num].len = cpu_to_le32(bytes);
	virt_wmb();
	vring->used->idx = cpu_to_le16(index + 1);
}

static void interrupt(unsigned int q)
{
	unsigned long flags;

	virt_mb();
	local_irq_save(flags);
	vring_interrupt(0, queues[q]);
	local_irq_restore(flags);
}

static void count_block(u64 pfn, unsigned int shift)
{
	u64 pages = 1ULL << (shift - 12), i;

	named_pages += pages;
	for (i = 0; i < pages; i++)
		used_pages += page_count(pfn_to_page(pfn + i)) != 0;
}

static void read_records(const __le64 *words, size_t count)
{
	size_t at = 0;

	while (at < count) {
		u64 header = le64_to_cpu(words[at++]), pfn = header & (BIT_ULL(52) - 1);
		unsigned int shift = header >> 52 & 63, bitmap = header >> 58, bit;

		if (!bitmap)
			count_block(pfn, shift);
		for (bit = 0; bit < bitmap * 64; bit++)
			if (le64_to_cpu(words[at + bit / 64]) >> (bit % 64) & 1)
				count_block(pfn + ((u64)bit << (shift - 12)), shift);
		at += bitmap;
	}
}

static void take_answer(const void *bytes, size_t length)
{
	const struct answer *answer = bytes;

	if (length < sizeof(*answer) || le32_to_cpu(answer->id) != last_id)
		return;
	newest = *answer;
	answers++;
	read_records(bytes + sizeof(*answer), (length - sizeof(*answer)) / sizeof(u64));
}

static void take_chain(unsigned int q, u16 head)
{
	const struct vring *vring = virtqueue_get_vring(queues[q]);
	struct vring_desc *first = &vring->desc[head], *last = first;

	if (q == REQUESTS && le16_to_cpu(first->flags) & VRING_DESC_F_WRITE) {
		waiting[waiting_chains++ % ENTRIES] = head;
		return;
	}
	while (le16_to_cpu(last->flags) & VRING_DESC_F_NEXT)
		last = &vring->desc[le16_to_cpu(last->next)];
	if (q == REQUESTS)
		take_answer(phys_to_virt(le64_to_cpu(first->addr)), le32_to_cpu(first->len));
	memset(phys_to_virt(le64_to_cpu(last->addr)), 0, 4);
	give_back(q, head, 4);
}

static void serve(struct work_struct *work)
{
	unsigned int q;

	mutex_lock(&lock);
	for (q = 0; q < QUEUES; q++) {
		const struct vring *vring = queues[q] ? virtqueue_get_vring(queues[q]) : NULL;
		bool any = false;

		while (vring && seen[q] != le16_to_cpu(READ_ONCE(vring->avail->idx))) {
			virt_rmb();
			take_chain(q, le16_to_cpu(vring->avail->ring[seen[q]++ % vring->num]));
			any = true;
		}
		if (any)
			interrupt(q);
	}
	mutex_unlock(&lock);
}
static DECLARE_WORK(service, serve);

static int ask_set(const char *text, const struct kernel_param *param)
{
	struct request request = {};
	u32 command;
	u64 argument;
	int err = 0;
	u16 head;

	if (sscanf(text, "%u %llu", &command, &argument) != 2)
		return -EINVAL;
	mutex_lock(&lock);
	if (!queues[REQUESTS] || !waiting_chains) {
		err = -EAGAIN;
		goto out;
	}
	head = waiting[--waiting_chains % ENTRIES];
	if (command == CANCEL) {
		request.id = cpu_to_le32((u32)argument);
	} else {
		request.id = cpu_to_le32(++last_id);
		request.argument = cpu_to_le64(argument);
		memset(&newest, 0, sizeof(newest));
		named_pages = used_pages = answers = 0;
	}
	request.command = cpu_to_le32(command);
	memcpy(phys_to_virt(le64_to_cpu(virtqueue_get_vring(queues[REQUESTS])->desc[head].addr)),
	       &request, sizeof(request));
	give_back(REQUESTS, head, sizeof(request));
	interrupt(REQUESTS);
out:
	mutex_unlock(&lock);
	return err;
}

static int answer_get(char *text, const struct kernel_param *param)
{
	int bytes;

	mutex_lock(&lock);
	bytes = sprintf(text, "%u %u %llu %llu %llu %llu %llu %llu %llu %llu\n",
			le32_to_cpu(newest.id), le32_to_cpu(newest.outcome),
			le64_to_cpu(newest.values[0]), le64_to_cpu(newest.values[1]),
			le64_to_cpu(newest.values[2]), le64_to_cpu(newest.values[3]),
			named_pages, used_pages, answers, le64_to_cpu(newest.elapsed_ns));
	mutex_unlock(&lock);
	return bytes;
}

static const struct kernel_param_ops ask_ops = { .set = ask_set };
static const struct kernel_param_ops answer_ops = { .get = answer_get };

module_param_cb(ask, &ask_ops, NULL, 0200);
MODULE_PARM_DESC(ask, "Request to send: COMMAND ARGUMENT");
module_param_cb(answer, &answer_ops, NULL, 0400);
MODULE_PARM_DESC(answer, "State of the newest request");

static bool notify(struct virtqueue *vq)
{
	/* The driver holds locks here that the answer takes. */
	schedule_work(&service);
	return true;
}

static int make_queue(struct virtio_device *vdev, unsigned int q, vq_callback_t *callback,
		      const char *name, struct virtqueue **vq)
{
	*vq = vring_create_virtqueue(q, ENTRIES, SMP_CACHE_BYTES, vdev, true, false, false,
				     notify, callback, name);
	return *vq ? 0 : -ENOMEM;
}

static void del_vqs(struct virtio_device *vdev)
{
	unsigned int q;

	cancel_work_sync(&service);
	mutex_lock(&lock);
	for (q = 0; q < QUEUES; q++) {
		if (queues[q])
			vring_del_virtqueue(queues[q]);
		queues[q] = NULL;
		seen[q] = 0;
	}
	waiting_chains = 0;
	mutex_unlock(&lock);
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
static int find_vqs(struct virtio_device *vdev, unsigned int count, struct virtqueue *vqs[],
		    struct virtqueue_info info[], struct irq_affinity *desc)
#define CALLBACK(q) info[q].callback
#define NAME(q) info[q].name
#else
static int find_vqs(struct virtio_device *vdev, unsigned int count, struct virtqueue *vqs[],
		    vq_callback_t *callbacks[], const char * const names[], const bool *ctx,
		    struct irq_affinity *desc)
#define CALLBACK(q) callbacks[q]
#define NAME(q) names[q]
#endif
{
	unsigned int q;

	if (count > QUEUES)
		return -EINVAL;
	for (q = 0; q < count; q++) {
		if (make_queue(vdev, q, CALLBACK(q), NAME(q), &vqs[q])) {
			del_vqs(vdev);
			return -ENOMEM;
		}
		queues[q] = vqs[q];
	}
	return 0;
}

static void get(struct virtio_device *vdev, unsigned int offset, void *buf, unsigned int len)
{
	memcpy(buf, (u8 *)&config + offset, len);
}

static void set(struct virtio_device *vdev, unsigned int offset, const void *buf,
		unsigned int len)
{
	memcpy((u8 *)&config + offset, buf, len);
}

static u8 get_status(struct virtio_device *vdev)
{
	return status;
}

static void set_status(struct virtio_device *vdev, u8 now)
{
	status = now;
}

/* After this, no memory of the driver is accessed. */
static void reset(struct virtio_device *vdev)
{
	unsigned int q;

	cancel_work_sync(&service);
	mutex_lock(&lock);
	status = 0;
	waiting_chains = 0;
	for (q = 0; q < QUEUES; q++)
		if (queues[q])
			seen[q] = le16_to_cpu(virtqueue_get_vring(queues[q])->avail->idx);
	mutex_unlock(&lock);
}

static u64 get_features(struct virtio_device *vdev)
{
	return FEATURES;
}

static int finalize_features(struct virtio_device *vdev)
{
	vring_transport_features(vdev);
	return 0;
}

static const struct virtio_config_ops ops = {
	.get = get,
	.set = set,
	.get_status = get_status,
	.set_status = set_status,
	.reset = reset,
	.find_vqs = find_vqs,
	.del_vqs = del_vqs,
	.get_features = get_features,
	.finalize_features = finalize_features,
};

static void release(struct device *dev)
{
	kfree(container_of(dev, struct virtio_device, dev));
}

static int __init lab_balloon_init(void)
{
	int err;

	parent = root_device_register("lab_balloon");
	if (IS_ERR(parent))
		return PTR_ERR(parent);
	device = kzalloc(sizeof(*device), GFP_KERNEL);
	if (!device) {
		root_device_unregister(parent);
		return -ENOMEM;
	}
	device->id.device = VIRTIO_ID_BALLOON;
	device->id.vendor = VIRTIO_DEV_ANY_ID;
	device->config = &ops;
	device->dev.parent = parent;
	device->dev.release = release;
	err = register_virtio_device(device);
	if (err) {
		put_device(&device->dev);
		root_device_unregister(parent);
	}
	return err;
}
module_init(lab_balloon_init);

static void __exit lab_balloon_exit(void)
{
	unregister_virtio_device(device);
	root_device_unregister(parent);
}
module_exit(lab_balloon_exit);

MODULE_DESCRIPTION("Balloon device inside a guest, for Aerostat's tests");
MODULE_LICENSE("GPL");
