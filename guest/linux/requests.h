/* SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0 */
/* The request queue: what the host asks, and the hold that it may have. */
#ifndef AEROSTAT_REQUESTS_H
#define AEROSTAT_REQUESTS_H

#include "aerostat.h"

/* One chain for the next request and one for a cancel. */
#define AEROSTAT_WAITING	2
/* Enough to fill one while the host reads others. */
#define AEROSTAT_ANSWERS	4
#define AEROSTAT_ANSWER_BYTES	4096u
/* A request or an answer without records, each in a cache line of its own. */
#define AEROSTAT_SHORT_BYTES	64u
#define AEROSTAT_REQUEST_BYTES	16u
#define AEROSTAT_HEADER_BYTES	48u

/* Slots by what they are for: waiting chains; for each of these the answer that
 * its request is one too many; answers; and the one that says "hold lost", which
 * waits for nobody.
 */
#define AEROSTAT_SLOT_WAITING	0
#define AEROSTAT_SLOT_BUSY	(AEROSTAT_SLOT_WAITING + AEROSTAT_WAITING)
#define AEROSTAT_SLOT_LOST	(AEROSTAT_SLOT_BUSY + AEROSTAT_WAITING)
#define AEROSTAT_SLOT_ANSWER	(AEROSTAT_SLOT_LOST + 1)
#define AEROSTAT_SLOTS		(AEROSTAT_SLOT_ANSWER + AEROSTAT_ANSWERS)

struct aerostat_slot {
	u8 *buffer;
	/* Whose answer it is. */
	u32 id;
	/* The host has it. */
	bool out;
	/* The host writes here. */
	__le32 status;
};

struct aerostat_requests {
	struct aerostat *vb;
	struct virtqueue *vq;
	struct workqueue_struct *wq;
	struct work_struct work;
	struct work_struct loss_work;
	struct delayed_work repost;
	/* Woken whenever something came back, or there is no more to wait for. */
	wait_queue_head_t returned;

	/* Belongs to the work item. */
	struct aerostat_requests_core *core;
	int current_slot;
	u64 ran_since_ns;

	/* Guards the queue, the slots and everything to the next comment. Never
	 * held while waiting, and taken by the queue's interrupt.
	 */
	spinlock_t lock;
	struct aerostat_inbox *inbox;
	bool stopping;
	bool gone;
	/* Something is on the queue that the host was not notified of. */
	bool to_notify;
	/* "Hold lost" found no room on the queue yet. */
	bool lost_unsent;
	/* It has come back. */
	bool lost_back;
	/* When it was sent, in jiffies. */
	unsigned long lost_at;
	void *short_buffers;
	struct aerostat_slot slots[AEROSTAT_SLOTS];

	/* Guards the hold; never held while waiting for the host. */
	struct mutex hold_lock;
	struct aerostat_hold *hold;
	struct list_head taken[AEROSTAT_MAX_ORDER + 1];
	struct list_head named;
};

/* requests.c */
void aerostat_say_lost(struct aerostat_requests *rq, u32 id, const u8 *header);
bool aerostat_loss_ended(struct aerostat_requests *rq);

/* hold.c */
int aerostat_alloc_hold(struct aerostat_requests *rq);
void aerostat_end_loss(struct aerostat_requests *rq);
void aerostat_mark_hold(struct aerostat_requests *rq);
void aerostat_leave_hold(struct aerostat_requests *rq);
void aerostat_clear_hold(struct aerostat_requests *rq);

#endif /* AEROSTAT_REQUESTS_H */
