// SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0
/*
 * The request queue. Its interrupt takes what the host asks into the inbox, so
 * that a cancel is seen at any time; a work item carries it out.
 */

#include <linux/delay.h>
#include <linux/ktime.h>
#include <linux/scatterlist.h>
#include <linux/sched.h>
#include <linux/sched/stat.h>
#include <linux/slab.h>

#include "requests.h"

/* While waiting, look this often whether the device has died. */
#define AEROSTAT_LOOK_JIFFIES	HZ
/* A waiting chain that the host gave up is offered again after this time: soon
 * enough for the next request, too late for the two to play ball.
 */
#define AEROSTAT_REPOST_JIFFIES	(HZ / 10)

/* After this time the work item looks whether others want its CPU, and sleeps
 * for the time below where they do. It has no hurry, while they may wait for
 * memory, and what slept before gets no turn for long by merely yielding.
 */
#define AEROSTAT_TURN_NS	(250 * NSEC_PER_USEC)
#define AEROSTAT_SLEEP_US	250

/* What the core says of a request that has come. */
enum { AEROSTAT_IGNORE, AEROSTAT_QUEUED, AEROSTAT_STOP_RUNNING, AEROSTAT_REFUSE };

/* Under the lock. Never waits or reclaims: this may be an interrupt, or the way
 * out of an OOM.
 */
static int aerostat_send_slot(struct aerostat_requests *rq, unsigned int index,
			      size_t bytes)
{
	struct aerostat_slot *slot = &rq->slots[index];
	bool answer = index >= AEROSTAT_SLOT_BUSY;
	struct scatterlist buffer, status, *sgs[] = { &buffer, &status };
	int err;

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

/* Under the lock. */
static void aerostat_notify(struct aerostat_requests *rq)
{
	if (rq->to_notify)
		virtqueue_kick(rq->vq);
	rq->to_notify = false;
}

/* Under the lock. Each chain waits for the refusal of its last request, so that
 * there is always room for one.
 */
static void aerostat_offer(struct aerostat_requests *rq)
{
	unsigned int i;

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
	aerostat_offer(rq);
	aerostat_notify(rq);
	spin_unlock_irq(&rq->lock);
}

/* A waiting chain came back. Its bytes are copied once: the host can still write
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
		/* No room on the queue: the host hears nothing, and times out. */
		aerostat_send_slot(rq, AEROSTAT_SLOT_BUSY + chain, AEROSTAT_HEADER_BYTES);
		break;
	}
	aerostat_offer(rq);
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

	slot->out = false;
	if (index < AEROSTAT_SLOT_BUSY) {
		aerostat_take_request(rq, index, len);
	} else if (index < AEROSTAT_SLOT_LOST) {
		aerostat_offer(rq);
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

/* The last answer of a hold. Whoever carries its request out must not send
 * another one behind it, which the lock and the inbox see to.
 */
void aerostat_say_lost(struct aerostat_requests *rq, u32 id, const u8 *header)
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

/* The host has answered, or it will not. */
bool aerostat_loss_ended(struct aerostat_requests *rq)
{
	return READ_ONCE(rq->lost_back) || READ_ONCE(rq->gone) || virtqueue_is_broken(rq->vq);
}

static int aerostat_stopped(struct aerostat_requests *rq, bool last)
{
	unsigned long flags;
	int stop;

	spin_lock_irqsave(&rq->lock, flags);
	/* What was done is said also on leaving, if it needs no waiting. */
	if (rq->gone || (rq->stopping && !last))
		stop = AEROSTAT_STOP_GONE;
	else
		stop = aerostat_inbox_stopped(rq->inbox);
	spin_unlock_irqrestore(&rq->lock, flags);
	return last && stop == AEROSTAT_STOP_CANCELLED ? 0 : stop;
}

/* Answers that the host has. */
static unsigned int aerostat_answers_out(struct aerostat_requests *rq)
{
	unsigned int i, out = 0;

	for (i = AEROSTAT_SLOT_ANSWER; i < AEROSTAT_SLOTS; i++)
		out += READ_ONCE(rq->slots[i].out);
	return out;
}

/* Waits until no more than so many answers are with the host. */
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
					AEROSTAT_LOOK_JIFFIES);
		if (virtqueue_is_broken(rq->vq))
			WRITE_ONCE(rq->gone, true);
	}
}

bool aerostat_shim_begin_next(struct aerostat *vb, void *asked)
{
	struct aerostat_requests *rq = vb->rq;
	bool next;

	spin_lock_irq(&rq->lock);
	next = aerostat_inbox_begin_next(rq->inbox, asked);
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
		/* Asked again under the lock: no answer behind "hold lost". */
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
		/* A ring that has no room has answers in it. */
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

/* Before the queues exist. Everything is the driver's: the device was reset. */
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

/* Once the device is ready. */
void aerostat_start_requests(struct aerostat_requests *rq, struct virtqueue *vq)
{
	rq->vq = vq;
	aerostat_repost(&rq->repost.work);
}

/* What runs ends, and so does who waits for the end of a hold. */
void aerostat_stopping_requests(struct aerostat_requests *rq)
{
	spin_lock_irq(&rq->lock);
	rq->stopping = true;
	spin_unlock_irq(&rq->lock);
	wake_up_all(&rq->returned);
}

/* Ends what runs, and tells the host that a hold is over where it listens. */
void aerostat_stop_requests(struct aerostat_requests *rq)
{
	aerostat_stopping_requests(rq);
	cancel_delayed_work_sync(&rq->repost);
	cancel_work_sync(&rq->work);
	/* Give a last answer the time that a host needs that listens. */
	wait_event_idle_timeout(rq->returned,
				!aerostat_answers_out(rq) || virtqueue_is_broken(rq->vq),
				AEROSTAT_LOOK_JIFFIES);
	aerostat_leave_hold(rq);
	cancel_work_sync(&rq->loss_work);
}

/* After the reset: the device has no claim on anything. */
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
	/* Not freezable: what waits for the host must not hold up a suspend. */
	rq->wq = alloc_workqueue("aerostat_requests", WQ_UNBOUND, 0);
	if (!rq->core || !rq->inbox || !rq->wq || aerostat_alloc_slots(rq) ||
	    aerostat_alloc_hold(rq)) {
		aerostat_free_requests(rq);
		return NULL;
	}
	return rq;
}
