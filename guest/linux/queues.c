// SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0
/* The queues and the configuration space. */

#include <linux/ktime.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>

#include "aerostat.h"

/* While waiting, check this often whether the device is broken. */
#define AEROSTAT_CHECK_JIFFIES	HZ
/* Checks before the removal of the driver gives up on a silent device. */
#define AEROSTAT_LAST_CHECKS	5

static void aerostat_acked(struct virtqueue *vq)
{
	struct aerostat *vb = vq->vdev->priv;

	wake_up(&vb->acked);
}

static void aerostat_take_status(struct aerostat *vb, u32 status)
{
	const char *why = aerostat_refusal(status);

	if (!why)
		return;
	vb->refused++;
	dev_warn_ratelimited(&vb->vdev->dev, "the host refused a message: %s\n", why);
}

/* Takes returned messages off the queue. Returns true if at most in_flight are left. */
static bool aerostat_returned(struct aerostat *vb, struct virtqueue *vq,
			      unsigned int in_flight)
{
	unsigned int len;
	__le32 *status;

	while ((status = virtqueue_get_buf(vq, &len))) {
		if (vb->answers)
			aerostat_take_status(vb, le32_to_cpu(*status));
		vb->idle |= BIT_ULL(status - vb->status);
		vb->in_flight--;
	}
	return vb->in_flight <= in_flight;
}

/* Notifies the host and waits until at most in_flight messages are on the queue. */
static int aerostat_wait(struct aerostat *vb, struct virtqueue *vq,
			 unsigned int in_flight)
{
	unsigned int checks = AEROSTAT_LAST_CHECKS;
	u64 start = ktime_get_ns();

	if (!vb->in_flight)
		return 0;
	if (!virtqueue_kick(vq))
		vb->gone = true;
	while (!vb->gone &&
	       !wait_event_idle_timeout(vb->acked,
					aerostat_returned(vb, vq, in_flight) ||
					virtqueue_is_broken(vq),
					AEROSTAT_CHECK_JIFFIES))
		vb->gone = virtqueue_is_broken(vq) ||
			   (READ_ONCE(vb->stopping) && !--checks);
	if (vb->in_flight > in_flight)
		vb->gone = true;
	vb->wait_ns += ktime_get_ns() - start;
	return vb->gone ? -ENODEV : 0;
}

static u8 *aerostat_slot(struct aerostat *vb, unsigned int slot)
{
	unsigned int per_page = AEROSTAT_BITMAP_BYTES / vb->slot_bytes;

	return vb->pool[slot / per_page] + slot % per_page * vb->slot_bytes;
}

u8 *aerostat_shim_buffer(struct aerostat *vb, u32 vq, size_t *bytes)
{
	lockdep_assert_held(&vb->lock);
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

int aerostat_shim_post(struct aerostat *vb, u32 vq, size_t bytes)
{
	struct scatterlist out, in, *sgs[] = { &out, &in };
	unsigned int slot = vb->current_slot;
	int err;

	lockdep_assert_held(&vb->lock);
	if (vb->gone || vq >= AEROSTAT_VQS || vb->current_slot < 0 ||
	    !bytes || bytes > vb->slot_bytes)
		return -EINVAL;
	sg_init_one(&out, aerostat_slot(vb, slot), bytes);
	vb->status[slot] = cpu_to_le32(~0u);
	sg_init_one(&in, &vb->status[slot], sizeof(vb->status[slot]));
	for (;;) {
		/* Neither uses reserves nor waits: this may run to resolve an OOM.
		 * -ENOSPC means that messages are on the queue.
		 */
		err = virtqueue_add_sgs(vb->vqs[vq], sgs, 1, vb->answers, &vb->status[slot],
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

int aerostat_shim_tell_host(struct aerostat *vb, u32 vq)
{
	lockdep_assert_held(&vb->lock);
	if (vb->gone || vq >= AEROSTAT_VQS)
		return -ENODEV;
	return aerostat_wait(vb, vb->vqs[vq], 0);
}

u32 aerostat_shim_num_pages(struct aerostat *vb)
{
	u32 pages = 0;

	lockdep_assert_held(&vb->lock);
	if (!vb->gone)
		virtio_cread_le(vb->vdev, struct virtio_balloon_config, num_pages, &pages);
	return pages;
}

void aerostat_shim_set_actual(struct aerostat *vb, u32 pages)
{
	lockdep_assert_held(&vb->lock);
	WRITE_ONCE(vb->pages, pages);
	if (!vb->gone)
		virtio_cwrite_le(vb->vdev, struct virtio_balloon_config, actual, &pages);
}

/* The request queue is the last of the queues that this driver negotiates. */
static int aerostat_find(struct aerostat *vb, unsigned int vqs)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	struct virtqueue_info info[AEROSTAT_MAX_VQS] = {
		{ "inflate", aerostat_acked },
		{ "deflate", aerostat_acked },
		{ "request", aerostat_requests_returned },
	};

	return virtio_find_vqs(vb->vdev, vqs, vb->vqs, info, NULL);
#else
	vq_callback_t *callbacks[AEROSTAT_MAX_VQS] = {
		aerostat_acked, aerostat_acked, aerostat_requests_returned,
	};
	static const char * const names[AEROSTAT_MAX_VQS] = { "inflate", "deflate", "request" };

	return virtio_find_vqs(vb->vdev, vqs, vb->vqs, callbacks, names, NULL);
#endif
}

int aerostat_find_vqs(struct aerostat *vb)
{
	int request = aerostat_request_vq(vb->vdev->features);

	if (request >= AEROSTAT_MAX_VQS)
		return -EINVAL;
	return aerostat_find(vb, request < 0 ? AEROSTAT_VQS : request + 1);
}

/* Marks all slots as idle, after a reset of the device. */
void aerostat_reset_slots(struct aerostat *vb)
{
	vb->answers = aerostat_has_page_bitmap(vb->vdev->features);
	vb->slot_bytes = vb->answers ? AEROSTAT_BITMAP_BYTES : AEROSTAT_PFNS_BYTES;
	vb->idle = GENMASK_ULL(AEROSTAT_POOL_PAGES * AEROSTAT_BITMAP_BYTES / vb->slot_bytes - 1, 0);
	vb->in_flight = 0;
	vb->current_slot = -1;
}

int aerostat_alloc_pool(struct aerostat *vb)
{
	unsigned int i;

	for (i = 0; i < AEROSTAT_POOL_PAGES; i++) {
		vb->pool[i] = kzalloc(AEROSTAT_BITMAP_BYTES, GFP_KERNEL);
		if (!vb->pool[i])
			return -ENOMEM;
	}
	return 0;
}

void aerostat_free_pool(struct aerostat *vb)
{
	unsigned int i;

	for (i = 0; i < AEROSTAT_POOL_PAGES; i++)
		kfree(vb->pool[i]);
}
