/* SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0 */
/* Definitions shared by the files of the C shim. */
#ifndef AEROSTAT_H
#define AEROSTAT_H

#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/shrinker.h>
#include <linux/version.h>
#include <linux/virtio.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_config.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "aerostat_core.h"

/* Inflate, deflate, and the request queue if negotiated. No other queue is. */
#define AEROSTAT_VQS		2
#define AEROSTAT_MAX_VQS	3

/* Aerostat's feature bits: page-bitmap messages; the request queue. */
#define AEROSTAT_F_PAGE_BITMAP	60
#define AEROSTAT_F_REQUEST_VQ	61

/* Memory for messages: 64 KiB in single pages, since a high-order allocation may
 * fail. Not static, since UML does not map .bss to devices.
 */
#define AEROSTAT_POOL_PAGES	16
#define AEROSTAT_BITMAP_BYTES	4096u
#define AEROSTAT_PFNS_BYTES	1024u
#define AEROSTAT_MAX_SLOTS	(AEROSTAT_POOL_PAGES * AEROSTAT_BITMAP_BYTES / AEROSTAT_PFNS_BYTES)

#if defined(MAX_PAGE_ORDER)
#define AEROSTAT_MAX_ORDER	MAX_PAGE_ORDER
#elif LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
#define AEROSTAT_MAX_ORDER	MAX_ORDER
#else
#define AEROSTAT_MAX_ORDER	(MAX_ORDER - 1)
#endif

/* How long a task that needs memory waits for the host, counted from the first such
 * request. A working host answers within a millisecond, and one that does not must not
 * stop the guest. Pages that arrive later are freed then. Reclaim can find other memory;
 * before the OOM killer runs, a longer wait may save a process.
 */
#define AEROSTAT_RECLAIM_JIFFIES	(HZ / 10)
#define AEROSTAT_OOM_JIFFIES		HZ

/* log2 of the balloon pages in a guest page. */
#define AEROSTAT_PAGE_SHIFT	(PAGE_SHIFT - VIRTIO_BALLOON_PFN_SHIFT)

struct aerostat_requests;

struct aerostat {
	struct virtio_device *vdev;
	struct virtqueue *vqs[AEROSTAT_MAX_VQS];
	struct workqueue_struct *wq;
	/* Only these two wait for the host without a timeout, one at a time: work
	 * follows the target, yield_work deflates under memory pressure.
	 */
	struct delayed_work work;
	struct work_struct yield_work;
	wait_queue_head_t acked;
	/* NULL if not negotiated. Has its own locks. */
	struct aerostat_requests *rq;

	/* Protects stopping (against a late config change) and everything up to
	 * yield_done.
	 */
	spinlock_t stop_lock;
	bool stopping;
	/* Balloon pages requested from yield_work and not started; nonzero ends a
	 * fill early.
	 */
	u64 yield_wanted;
	/* yield_work has an unfinished request, since yield_since. */
	bool yield_pending;
	unsigned long yield_since;
	/* Finished runs of yield_work, and the guest pages that they freed. */
	u64 yield_runs;
	u64 yield_freed;
	wait_queue_head_t yield_done;

	/* Protects everything below; owner is the task that holds it. */
	struct mutex lock;
	struct task_struct *owner;
	struct aerostat_core *core;
	/* The queues exist. */
	bool started;
	bool gone;
	bool starved;
	/* The balloon yielded pages since the last run that was not starved. */
	bool yielded;

	/* The balloon's blocks by order, and blocks that are being deflated. */
	struct list_head blocks[AEROSTAT_MAX_ORDER + 1];
	struct list_head withdrawn;

	/* Message slots; idle has a bit for each slot that the host does not have. */
	void *pool[AEROSTAT_POOL_PAGES];
	bool answers;
	unsigned int slot_bytes;
	unsigned int in_flight;
	u64 idle;
	int current_slot;

	/* oom_nb and shrinker are registered. */
	bool pressure_registered;
	struct notifier_block oom_nb;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
	struct shrinker *shrinker;
#else
	struct shrinker shrinker;
#endif

	/* Read without the lock by sysfs and the shrinker (see ABI.md). */
	u64 pages;
	u64 messages;
	u64 refused;
	u64 run_ns;
	u64 wait_ns;
	u64 requests;
	u64 held;
	u64 holds_lost;

	/* Written by the host. */
	__le32 status[AEROSTAT_MAX_SLOTS] ____cacheline_aligned;
};

/* main.c */
void aerostat_lock(struct aerostat *vb);
void aerostat_unlock(struct aerostat *vb);

static inline bool aerostat_deflates_on_oom(struct aerostat *vb)
{
	return virtio_has_feature(vb->vdev, VIRTIO_BALLOON_F_DEFLATE_ON_OOM);
}

/* memory.c */
void aerostat_keep_block(struct page *page, unsigned int order, struct list_head *list);
void aerostat_mark_new(struct list_head *blocks);
void aerostat_mark_balloon(struct aerostat *vb);
unsigned int aerostat_leave_block(struct page *page);
void aerostat_free_all(struct aerostat *vb);

/* queues.c */
int aerostat_find_vqs(struct aerostat *vb);
void aerostat_reset_slots(struct aerostat *vb);
int aerostat_alloc_pool(struct aerostat *vb);
void aerostat_free_pool(struct aerostat *vb);

/* requests.c */
struct aerostat_requests *aerostat_alloc_requests(struct aerostat *vb);
void aerostat_free_requests(struct aerostat_requests *rq);
void aerostat_reset_requests(struct aerostat_requests *rq);
void aerostat_start_requests(struct aerostat_requests *rq, struct virtqueue *vq);
void aerostat_stop_requests(struct aerostat_requests *rq);
void aerostat_forget_requests(struct aerostat_requests *rq);
void aerostat_stopping_requests(struct aerostat_requests *rq);
void aerostat_requests_returned(struct virtqueue *vq);

/* hold.c */
u64 aerostat_lose_hold(struct aerostat *vb, bool wait_for_lock, unsigned long timeout);

/* pressure.c */
bool aerostat_is_short(void);
void aerostat_yield_work(struct work_struct *work);
int aerostat_register_pressure(struct aerostat *vb);
void aerostat_unregister_pressure(struct aerostat *vb);

#endif /* AEROSTAT_H */
