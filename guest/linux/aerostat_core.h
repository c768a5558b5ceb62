/* SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0 */
/*
 * What the glue and the Rust core (core/src) call of each other. All of it
 * happens under the balloon mutex, except the functions marked "no state".
 */
#ifndef AEROSTAT_CORE_H
#define AEROSTAT_CORE_H

#include <linux/types.h>

struct aerostat;
struct aerostat_core;

#define AEROSTAT_NO_PFN (~0ULL)

/* Entry points of the core: core/src/entry.rs says what they mean. */
size_t aerostat_core_bytes(void);				/* no state */
bool aerostat_has_page_bitmap(u64 negotiated);			/* no state */
u64 aerostat_shrinkable(u64 held, u64 available, u64 total);	/* no state */
const char *aerostat_refusal(u32 status);			/* no state */
void aerostat_init(struct aerostat_core *core, u64 negotiated, u32 page_shift,
		   u32 max_order);
int aerostat_run(struct aerostat_core *core, struct aerostat *vb);
u64 aerostat_yield(struct aerostat_core *core, struct aerostat *vb, u64 wanted);
int aerostat_empty(struct aerostat_core *core, struct aerostat *vb);

/* What the glue gives the core: core/src/kernel.rs. Page numbers and counts
 * are in balloon pages of 4 KiB; errors are negative.
 */
u64 aerostat_glue_allocate(struct aerostat *vb, u32 order);
u64 aerostat_glue_withdraw(struct aerostat *vb, u32 order);
void aerostat_glue_free_withdrawn(struct aerostat *vb);
u8 *aerostat_glue_buffer(struct aerostat *vb, u32 vq, size_t *bytes);
int aerostat_glue_post(struct aerostat *vb, u32 vq, size_t bytes);
int aerostat_glue_tell_host(struct aerostat *vb, u32 vq);
u32 aerostat_glue_num_pages(struct aerostat *vb);
void aerostat_glue_set_actual(struct aerostat *vb, u32 pages);
void aerostat_glue_bug(const char *file, size_t file_bytes, u32 line);

#endif /* AEROSTAT_CORE_H */
