/* SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0 */
/* The request queue and the hold. */
#ifndef AEROSTAT_REQUESTS_H
#define AEROSTAT_REQUESTS_H

#include "aerostat.h"

/* One chain for the next request and one for a cancel. */
#define AEROSTAT_WAITING	2
/* Enough to fill one while the host reads the others. */
#define AEROSTAT_ANSWERS	4
#define AEROSTAT_ANSWER_BYTES	4096u
/* A request or an answer without records, each in its own cache line. */
#define AEROSTAT_SHORT_BYTES	64u
#define AEROSTAT_REQUEST_BYTES	16u
#define AEROSTAT_HEADER_BYTES	48u

/* Slots by purpose: waiting chains; for each of these the "busy" answer to its
 * request; the "hold lost" answer, which needs no free slot; answers.
 */
#define AEROSTAT_SLOT_WAITING	0
#define AEROSTAT_SLOT_BUSY	(AEROSTAT_SLOT_WAITING + AEROSTAT_WAITING)
#define AEROSTAT_SLOT_LOST	(AEROSTAT_SLOT_BUSY + AEROSTAT_WAITING)
#define AEROSTAT_SLOT_ANSWER	(AEROSTAT_SLOT_LOST + 1)
#define AEROSTAT_SLOTS		(AEROSTAT_SLOT_ANSWER + AEROSTAT_ANSWERS)

struct aerostat_slot {
	u8 *buffer;
	/* Id of the request that it answers. */
	u32 id;
	/* It is on the queue. */
	bool out;
	/* Written by the host. */
	__le32 status;
};

struct aerostat_requests {
	struct aerostat *vb;
	struct virtqueue *vq;
	struct workqueue_struct *wq;
	struct work_struct work;
	struct work_struct loss_work;
	struct delayed_work repost;
	/* Woken when chains are returned, and when waiting must end. */
	wait_queue_head_t returned;

	/* Used only by the work item. */
	struct aerostat_requests_core *core;
	int current_slot;
	u64 ran_since_ns;

	/* Protects the queue, the slots and everything up to hold_lock. Taken by the
	 * queue's interrupt.
	 */
	spinlock_t lock;
	struct aerostat_inbox *inbox;
	bool stopping;
	bool gone;
	/* Chains were added since the last notification. */
	bool to_notify;
	/* "Hold lost" must still be sent: the queue was full. */
	bool lost_unsent;
	/* The host has returned "hold lost". */
	bool lost_back;
	/* When "hold lost" was sent, in jiffies. */
	unsigned long lost_at;
	void *short_buffers;
	struct aerostat_slot slots[AEROSTAT_SLOTS];

	/* Protects the hold. Never held while waiting for the host. */
	struct mutex hold_lock;
	struct aerostat_hold *hold;
	struct list_head taken[AEROSTAT_MAX_ORDER + 1];
	struct list_head named;
};

/* requests.c */
void aerostat_send_lost(struct aerostat_requests *rq, u32 id, const u8 *header);
bool aerostat_loss_ended(struct aerostat_requests *rq);

/* hold.c */
int aerostat_alloc_hold(struct aerostat_requests *rq);
void aerostat_end_loss(struct aerostat_requests *rq);
void aerostat_mark_hold(struct aerostat_requests *rq);
void aerostat_leave_hold(struct aerostat_requests *rq);
void aerostat_clear_hold(struct aerostat_requests *rq);

#endif /* AEROSTAT_REQUESTS_H */
