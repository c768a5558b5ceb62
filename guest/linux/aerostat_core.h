/* SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0 */
/*
 * Functions that the C shim and the Rust core (core/src) call in each other. All
 * are called with the balloon mutex held, except those marked "no state" and those
 * for requests, which name their lock.
 */
#ifndef AEROSTAT_CORE_H
#define AEROSTAT_CORE_H

#include <linux/types.h>

struct aerostat;
struct aerostat_core;
struct aerostat_requests_core;
struct aerostat_inbox;
struct aerostat_hold;

#define AEROSTAT_NO_PFN (~0ULL)

/* Entry points of the core, documented in core/src/entry.rs. */
size_t aerostat_core_bytes(void);				/* no state */
bool aerostat_has_page_bitmap(u64 negotiated);			/* no state */
u64 aerostat_shrinkable(u64 held, u64 available, u64 total);	/* no state */
const char *aerostat_refusal(u32 status);			/* no state */
void aerostat_init(struct aerostat_core *core, u64 negotiated, u32 page_shift,
		   u32 max_order);
int aerostat_run(struct aerostat_core *core, struct aerostat *vb);
u64 aerostat_yield(struct aerostat_core *core, struct aerostat *vb, u64 wanted);
int aerostat_empty(struct aerostat_core *core, struct aerostat *vb);

/* Why the running request must stop. */
#define AEROSTAT_STOP_CANCELLED	1
#define AEROSTAT_STOP_REFUSED	2
#define AEROSTAT_STOP_LOST	3
#define AEROSTAT_STOP_GONE	4

/* Requests: core/src/requests.rs. */
size_t aerostat_requests_bytes(void);				/* no state */
size_t aerostat_inbox_bytes(void);				/* no state */
size_t aerostat_hold_bytes(void);				/* no state */
int aerostat_request_vq(u64 negotiated);			/* no state */
/* Called only by the work item. */
void aerostat_requests_init(struct aerostat_requests_core *core, u32 page_shift,
			    u32 max_order);
u64 aerostat_requests_run(struct aerostat_requests_core *core, struct aerostat *vb);
/* Called with the queue's spinlock held. */
void aerostat_inbox_init(struct aerostat_inbox *inbox);
int aerostat_inbox_take(struct aerostat_inbox *inbox, const u8 *request, u8 *answer);
bool aerostat_inbox_begin_next(struct aerostat_inbox *inbox, void *request);
int aerostat_inbox_stopped(const struct aerostat_inbox *inbox);
const char *aerostat_inbox_answered(struct aerostat_inbox *inbox, u32 id, u32 status);
void aerostat_inbox_lose(struct aerostat_inbox *inbox, u32 id);
/* Called with the hold's mutex held. */
void aerostat_hold_init(struct aerostat_hold *hold);
u64 aerostat_hold_pages(const struct aerostat_hold *hold);
u32 aerostat_hold_lose(struct aerostat_hold *hold, u64 now_ns, u8 *answer);
bool aerostat_hold_is_losing(const struct aerostat_hold *hold);
u64 aerostat_hold_emptied(struct aerostat_hold *hold);

/* The shim's functions for the core, declared in core/src/kernel.rs. Page numbers
 * and counts are in balloon pages of 4 KiB; errors are negative.
 */
u64 aerostat_shim_allocate(struct aerostat *vb, u32 order);
u64 aerostat_shim_withdraw(struct aerostat *vb, u32 order);
void aerostat_shim_free_withdrawn(struct aerostat *vb);
u8 *aerostat_shim_buffer(struct aerostat *vb, u32 vq, size_t *bytes);
int aerostat_shim_post(struct aerostat *vb, u32 vq, size_t bytes);
int aerostat_shim_tell_host(struct aerostat *vb, u32 vq);
u32 aerostat_shim_num_pages(struct aerostat *vb);
void aerostat_shim_set_actual(struct aerostat *vb, u32 pages);
void aerostat_shim_bug(const char *file, size_t file_bytes, u32 line);

/* For requests, declared in core/src/request_kernel.rs. Called by the work item,
 * without the balloon mutex; an int is 0 or AEROSTAT_STOP_*.
 */
bool aerostat_shim_begin_next(struct aerostat *vb, void *request);
int aerostat_shim_stopped(struct aerostat *vb);
int aerostat_shim_answer_buffer(struct aerostat *vb, bool last, u8 **buffer, size_t *bytes);
int aerostat_shim_post_answer(struct aerostat *vb, u32 id, size_t bytes);
int aerostat_shim_finish_answers(struct aerostat *vb);
u64 aerostat_shim_now_ns(void);
u64 aerostat_shim_page_cache(void);
u64 aerostat_shim_slab(void);
int aerostat_shim_drop_caches(u32 caches);
u64 aerostat_shim_free_pages(void);
u64 aerostat_shim_total_pages(void);
u64 aerostat_shim_reserved_pages(void);
bool aerostat_shim_zone(u32 number, u64 *start, u64 *end);
bool aerostat_shim_has_free(u32 order);
u64 aerostat_shim_scan(u32 number, u64 from, u32 order, u32 visits, u64 *found,
		       size_t *count, u64 *lock_ns);
void *aerostat_shim_hold_lock(struct aerostat *vb);
void aerostat_shim_hold_unlock(struct aerostat *vb);
bool aerostat_shim_hold_take(struct aerostat *vb, u32 order);
u64 aerostat_shim_hold_name(struct aerostat *vb, u32 order);
void aerostat_shim_hold_free(struct aerostat *vb);

#endif /* AEROSTAT_CORE_H */
