// SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0
/*
 * The request queue. Its interrupt puts the host's requests into the inbox, so that a
 * cancel is seen at any time. A work item executes them.
 */

#include <linux/delay.h>
#include <linux/ktime.h>
#include <linux/scatterlist.h>
#include <linux/sched.h>
#include <linux/sched/stat.h>
#include <linux/slab.h>

#include "requests.h"

/* While waiting, check this often whether the device is broken. */
#define AEROSTAT_CHECK_JIFFIES	HZ
/* Delay before a waiting chain that the host returned unused is posted again: short
 * enough for the next request, and long enough to avoid a busy loop with the host.
 */
#define AEROSTAT_REPOST_JIFFIES	(HZ / 10)

/* After this time the work item sleeps for AEROSTAT_SLEEP_US if other tasks want its CPU.
 * It is not urgent, and the others may wait for memory. cond_resched alone would not let a
 * task that slept before run for long.
 */
#define AEROSTAT_TURN_NS	(250 * NSEC_PER_USEC)
#define AEROSTAT_SLEEP_US	250

/* Results of aerostat_inbox_take. */
enum { AEROSTAT_IGNORE, AEROSTAT_QUEUED, AEROSTAT_STOP_RUNNING, AEROSTAT_REFUSE };

/* Neither waits nor reclaims: this may be an interrupt, or run to resolve an OOM. */
static int aerostat_send_slot(struct aerostat_requests *rq, unsigned int index,
			      size_t bytes)
{
	struct aerostat_slot *slot = &rq->slots[index];
	bool answer = index >= AEROSTAT_SLOT_BUSY;
	struct scatterlist buffer, status, *sgs[] = { &buffer, &status };
	int err;

	lockdep_assert_held(&rq->lock);
	sg_init_one(&buffer, slot->buffer, bytes);
	slot->status = cpu_to_le32(~0u);
	sg_init_one(&status, &slot->status, sizeof(slot->status));
	err = virtqueue_add_sgs(rq->vq, sgs, answer, 1, slot, GFP_ATOMIC | __GFP_NOWARN);
	if (!err) {
		slot->out = true;
		rq->to_notify = true;
	}
	return err;
}

static void aerostat_notify(struct aerostat_requests *rq)
{
	lockdep_assert_held(&rq->lock);
	if (rq->to_notify)
		virtqueue_kick(rq->vq);
	rq->to_notify = false;
}

/* Posts the waiting chains. A chain is not posted while its "busy" slot is in use, so
 * that its next request can always be refused.
 */
static void aerostat_post_waiting(struct aerostat_requests *rq)
{
	unsigned int i;

	lockdep_assert_held(&rq->lock);
	for (i = 0; i < AEROSTAT_WAITING && !rq->stopping; i++) {
		if (rq->slots[AEROSTAT_SLOT_WAITING + i].out ||
		    rq->slots[AEROSTAT_SLOT_BUSY + i].out)
			continue;
		if (aerostat_send_slot(rq, AEROSTAT_SLOT_WAITING + i, AEROSTAT_REQUEST_BYTES))
			queue_delayed_work(rq->wq, &rq->repost, AEROSTAT_REPOST_JIFFIES);
	}
}

static void aerostat_repost(struct work_struct *work)
{
	struct aerostat_requests *rq = container_of(work, struct aerostat_requests,
						    repost.work);

	spin_lock_irq(&rq->lock);
	aerostat_post_waiting(rq);
	aerostat_notify(rq);
	spin_unlock_irq(&rq->lock);
}

/* Handles a returned waiting chain. Copies its bytes once, since the host can still write
 * there.
 */
static void aerostat_take_request(struct aerostat_requests *rq, unsigned int chain,
				  unsigned int len)
{
	struct aerostat_slot *busy = &rq->slots[AEROSTAT_SLOT_BUSY + chain];
	u8 request[AEROSTAT_REQUEST_BYTES];

	if (len < sizeof(request)) {
		if (!rq->stopping)
			queue_delayed_work(rq->wq, &rq->repost, AEROSTAT_REPOST_JIFFIES);
		return;
	}
	memcpy(request, rq->slots[AEROSTAT_SLOT_WAITING + chain].buffer, sizeof(request));
	switch (aerostat_inbox_take(rq->inbox, request, busy->buffer)) {
	case AEROSTAT_QUEUED:
		if (!rq->stopping)
			queue_work(rq->wq, &rq->work);
		break;
	case AEROSTAT_REFUSE:
		/* If the queue is full, the host gets no answer and times out. */
		aerostat_send_slot(rq, AEROSTAT_SLOT_BUSY + chain, AEROSTAT_HEADER_BYTES);
		break;
	}
	aerostat_post_waiting(rq);
}

static void aerostat_take_status(struct aerostat_requests *rq, struct aerostat_slot *slot)
{
	struct aerostat *vb = rq->vb;
	const char *why = aerostat_inbox_answered(rq->inbox, slot->id,
						  le32_to_cpu(slot->status));

	if (!why)
		return;
	vb->refused++;
	dev_warn_ratelimited(&vb->vdev->dev, "the host refused an answer: %s\n", why);
}

static void aerostat_take_back(struct aerostat_requests *rq, struct aerostat_slot *slot,
			       unsigned int len)
{
	unsigned int index = slot - rq->slots;

	lockdep_assert_held(&rq->lock);
	slot->out = false;
	if (index < AEROSTAT_SLOT_BUSY) {
		aerostat_take_request(rq, index, len);
	} else if (index < AEROSTAT_SLOT_LOST) {
		aerostat_post_waiting(rq);
	} else if (index == AEROSTAT_SLOT_LOST) {
		rq->lost_back = true;
		if (!rq->stopping)
			queue_work(rq->wq, &rq->loss_work);
	} else {
		aerostat_take_status(rq, slot);
	}
}

void aerostat_requests_returned(struct virtqueue *vq)
{
	struct aerostat *vb = vq->vdev->priv;
	struct aerostat_requests *rq = vb->rq;
	struct aerostat_slot *slot;
	unsigned long flags;
	unsigned int len;

	spin_lock_irqsave(&rq->lock, flags);
	while ((slot = virtqueue_get_buf(vq, &len)))
		aerostat_take_back(rq, slot, len);
	if (rq->lost_unsent &&
	    !aerostat_send_slot(rq, AEROSTAT_SLOT_LOST, AEROSTAT_HEADER_BYTES))
		rq->lost_unsent = false;
	aerostat_notify(rq);
	spin_unlock_irqrestore(&rq->lock, flags);
	wake_up_all(&rq->returned);
}

/* Sends "hold lost", the last answer of a hold. The lock and the inbox prevent the work
 * item from sending another one after it.
 */
void aerostat_send_lost(struct aerostat_requests *rq, u32 id, const u8 *header)
{
	unsigned long flags;

	spin_lock_irqsave(&rq->lock, flags);
	aerostat_inbox_lose(rq->inbox, id);
	memcpy(rq->slots[AEROSTAT_SLOT_LOST].buffer, header, AEROSTAT_HEADER_BYTES);
	rq->lost_back = false;
	WRITE_ONCE(rq->lost_at, jiffies);
	rq->lost_unsent = aerostat_send_slot(rq, AEROSTAT_SLOT_LOST, AEROSTAT_HEADER_BYTES);
	aerostat_notify(rq);
	spin_unlock_irqrestore(&rq->lock, flags);
	wake_up_all(&rq->returned);
}

/* Returns true if the host has returned "hold lost", or never will. */
bool aerostat_loss_ended(struct aerostat_requests *rq)
{
	return READ_ONCE(rq->lost_back) || READ_ONCE(rq->gone) || virtqueue_is_broken(rq->vq);
}

static int aerostat_stopped(struct aerostat_requests *rq, bool last)
{
	unsigned long flags;
	int stop;

	spin_lock_irqsave(&rq->lock, flags);
	/* A last answer is sent even during removal, if that needs no waiting. */
	if (rq->gone || (rq->stopping && !last))
		stop = AEROSTAT_STOP_GONE;
	else
		stop = aerostat_inbox_stopped(rq->inbox);
	spin_unlock_irqrestore(&rq->lock, flags);
	return last && stop == AEROSTAT_STOP_CANCELLED ? 0 : stop;
}

/* Returns the number of answers on the queue. */
static unsigned int aerostat_answers_out(struct aerostat_requests *rq)
{
	unsigned int i, out = 0;

	for (i = AEROSTAT_SLOT_ANSWER; i < AEROSTAT_SLOTS; i++)
		out += READ_ONCE(rq->slots[i].out);
	return out;
}

/* Waits until at most this many answers are on the queue. */
static int aerostat_wait_answers(struct aerostat_requests *rq, unsigned int most, bool last)
{
	int stop;

	for (;;) {
		stop = aerostat_stopped(rq, last);
		if (stop || aerostat_answers_out(rq) <= most)
			return stop;
		if (READ_ONCE(rq->stopping))
			return AEROSTAT_STOP_GONE;
		wait_event_idle_timeout(rq->returned,
					aerostat_answers_out(rq) <= most ||
					READ_ONCE(rq->stopping) || aerostat_stopped(rq, last),
					AEROSTAT_CHECK_JIFFIES);
		if (virtqueue_is_broken(rq->vq))
			WRITE_ONCE(rq->gone, true);
	}
}

bool aerostat_shim_begin_next(struct aerostat *vb, void *request)
{
	struct aerostat_requests *rq = vb->rq;
	bool next;

	spin_lock_irq(&rq->lock);
	next = aerostat_inbox_begin_next(rq->inbox, request);
	spin_unlock_irq(&rq->lock);
	return next;
}

int aerostat_shim_stopped(struct aerostat *vb)
{
	struct aerostat_requests *rq = vb->rq;

	if (ktime_get_ns() - rq->ran_since_ns > AEROSTAT_TURN_NS) {
		if (single_task_running())
			cond_resched();
		else
			usleep_range(AEROSTAT_SLEEP_US, 2 * AEROSTAT_SLEEP_US);
		rq->ran_since_ns = ktime_get_ns();
	}
	return aerostat_stopped(rq, false);
}

int aerostat_shim_answer_buffer(struct aerostat *vb, bool last, u8 **buffer, size_t *bytes)
{
	struct aerostat_requests *rq = vb->rq;
	int stop = aerostat_wait_answers(rq, rq->current_slot < 0 ? AEROSTAT_ANSWERS - 1 :
					 AEROSTAT_ANSWERS, last);
	unsigned int i;

	if (stop)
		return stop;
	for (i = AEROSTAT_SLOT_ANSWER; rq->current_slot < 0 && i < AEROSTAT_SLOTS; i++)
		if (!READ_ONCE(rq->slots[i].out))
			rq->current_slot = i;
	*buffer = rq->slots[rq->current_slot].buffer;
	*bytes = AEROSTAT_ANSWER_BYTES;
	return 0;
}

int aerostat_shim_post_answer(struct aerostat *vb, u32 id, size_t bytes)
{
	struct aerostat_requests *rq = vb->rq;
	int stop, err = -EINVAL;

	if (rq->current_slot < 0 || bytes < AEROSTAT_HEADER_BYTES ||
	    bytes > AEROSTAT_ANSWER_BYTES)
		return AEROSTAT_STOP_GONE;
	for (;;) {
		spin_lock_irq(&rq->lock);
		/* Checked again under the lock: no answer may follow "hold lost". */
		stop = rq->gone ? AEROSTAT_STOP_GONE : aerostat_inbox_stopped(rq->inbox);
		if (!stop || stop == AEROSTAT_STOP_CANCELLED) {
			stop = 0;
			rq->slots[rq->current_slot].id = id;
			err = aerostat_send_slot(rq, rq->current_slot, bytes);
		}
		aerostat_notify(rq);
		spin_unlock_irq(&rq->lock);
		if (stop)
			return stop;
		if (!err) {
			rq->current_slot = -1;
			return 0;
		}
		/* -ENOSPC means that answers are on the queue. */
		if (err != -ENOSPC || !aerostat_answers_out(rq))
			break;
		stop = aerostat_wait_answers(rq, aerostat_answers_out(rq) - 1, true);
		if (stop)
			return stop;
	}
	dev_err(&vb->vdev->dev, "no answer can be sent: error %d\n", err);
	WRITE_ONCE(rq->gone, true);
	return AEROSTAT_STOP_GONE;
}

int aerostat_shim_finish_answers(struct aerostat *vb)
{
	return aerostat_wait_answers(vb->rq, 0, true);
}

u64 aerostat_shim_now_ns(void)
{
	return ktime_get_ns();
}

static void aerostat_request_work(struct work_struct *work)
{
	struct aerostat_requests *rq = container_of(work, struct aerostat_requests, work);

	rq->ran_since_ns = ktime_get_ns();
	rq->vb->requests += aerostat_requests_run(rq->core, rq->vb);
	aerostat_mark_hold(rq);
}

static void aerostat_loss_work(struct work_struct *work)
{
	aerostat_end_loss(container_of(work, struct aerostat_requests, loss_work));
}

/* Called before the queues exist, after a reset of the device. */
void aerostat_reset_requests(struct aerostat_requests *rq)
{
	unsigned int i;

	for (i = 0; i < AEROSTAT_SLOTS; i++)
		rq->slots[i].out = false;
	rq->current_slot = -1;
	rq->stopping = false;
	rq->gone = false;
	rq->to_notify = false;
	rq->lost_unsent = false;
	rq->lost_back = false;
	aerostat_inbox_init(rq->inbox);
	aerostat_requests_init(rq->core, PAGE_SHIFT, AEROSTAT_MAX_ORDER);
}

/* Called once the device is ready. */
void aerostat_start_requests(struct aerostat_requests *rq, struct virtqueue *vq)
{
	rq->vq = vq;
	aerostat_repost(&rq->repost.work);
}

/* Ends the running request and all waits for the end of a hold. */
void aerostat_stopping_requests(struct aerostat_requests *rq)
{
	spin_lock_irq(&rq->lock);
	rq->stopping = true;
	spin_unlock_irq(&rq->lock);
	wake_up_all(&rq->returned);
}

/* Stops all requests, and sends "hold lost" if the device answers. */
void aerostat_stop_requests(struct aerostat_requests *rq)
{
	aerostat_stopping_requests(rq);
	cancel_delayed_work_sync(&rq->repost);
	cancel_work_sync(&rq->work);
	/* Wait until a working host has returned the last answer. */
	wait_event_idle_timeout(rq->returned,
				!aerostat_answers_out(rq) || virtqueue_is_broken(rq->vq),
				AEROSTAT_CHECK_JIFFIES);
	aerostat_leave_hold(rq);
	cancel_work_sync(&rq->loss_work);
}

/* Called after the reset: the device has no claim on the hold. */
void aerostat_forget_requests(struct aerostat_requests *rq)
{
	WRITE_ONCE(rq->gone, true);
	aerostat_clear_hold(rq);
}

void aerostat_free_requests(struct aerostat_requests *rq)
{
	unsigned int i;

	if (!rq)
		return;
	if (rq->wq)
		destroy_workqueue(rq->wq);
	for (i = AEROSTAT_SLOT_ANSWER; i < AEROSTAT_SLOTS; i++)
		kfree(rq->slots[i].buffer);
	kfree(rq->short_buffers);
	kfree(rq->hold);
	kfree(rq->inbox);
	kfree(rq->core);
	kfree(rq);
}

static int aerostat_alloc_slots(struct aerostat_requests *rq)
{
	unsigned int i;

	rq->short_buffers = kcalloc(AEROSTAT_SLOT_ANSWER, AEROSTAT_SHORT_BYTES, GFP_KERNEL);
	if (!rq->short_buffers)
		return -ENOMEM;
	for (i = 0; i < AEROSTAT_SLOTS; i++) {
		if (i < AEROSTAT_SLOT_ANSWER)
			rq->slots[i].buffer = rq->short_buffers + i * AEROSTAT_SHORT_BYTES;
		else
			rq->slots[i].buffer = kzalloc(AEROSTAT_ANSWER_BYTES, GFP_KERNEL);
		if (!rq->slots[i].buffer)
			return -ENOMEM;
	}
	return 0;
}

struct aerostat_requests *aerostat_alloc_requests(struct aerostat *vb)
{
	struct aerostat_requests *rq = kzalloc(sizeof(*rq), GFP_KERNEL);

	if (!rq)
		return NULL;
	rq->vb = vb;
	spin_lock_init(&rq->lock);
	init_waitqueue_head(&rq->returned);
	INIT_WORK(&rq->work, aerostat_request_work);
	INIT_WORK(&rq->loss_work, aerostat_loss_work);
	INIT_DELAYED_WORK(&rq->repost, aerostat_repost);
	rq->core = kzalloc(aerostat_requests_bytes(), GFP_KERNEL);
	rq->inbox = kzalloc(aerostat_inbox_bytes(), GFP_KERNEL);
	/* Not freezable: a wait for the host must not block a suspend. */
	rq->wq = alloc_workqueue("aerostat_requests", WQ_UNBOUND, 0);
	if (!rq->core || !rq->inbox || !rq->wq || aerostat_alloc_slots(rq) ||
	    aerostat_alloc_hold(rq)) {
		aerostat_free_requests(rq);
		return NULL;
	}
	return rq;
}
