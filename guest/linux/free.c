// SPDX-License-Identifier: GPL-2.0-only OR MIT OR Apache-2.0
/* Scanning free blocks, dropping caches, and memory counters. */

#include <linux/fs.h>
#include <linux/ktime.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/nodemask.h>
#include <linux/pageblock-flags.h>
#include <linux/rcupdate.h>
#include <linux/swap.h>
#include <linux/vmstat.h>

#include "aerostat.h"

/* drop_slab and iterate_supers are not exported, so use the sysctl file. */
#define AEROSTAT_DROP_CACHES	"/proc/sys/vm/drop_caches"

/* Zones of all nodes, numbered consecutively; NULL if the node is offline. */
static struct zone *aerostat_zone(u32 number)
{
	unsigned int node = number / MAX_NR_ZONES;

	if (node >= nr_node_ids || !node_online(node))
		return NULL;
	return &NODE_DATA(node)->node_zones[number % MAX_NR_ZONES];
}

static u32 aerostat_zones(void)
{
	return nr_node_ids * MAX_NR_ZONES;
}

bool aerostat_shim_zone(u32 number, u64 *start, u64 *end)
{
	struct zone *zone = aerostat_zone(number);

	if (number >= aerostat_zones())
		return false;
	*start = 0;
	*end = 0;
	if (zone && populated_zone(zone)) {
		*start = (u64)zone->zone_start_pfn << AEROSTAT_PAGE_SHIFT;
		*end = (u64)zone_end_pfn(zone) << AEROSTAT_PAGE_SHIFT;
	}
	return true;
}

bool aerostat_shim_has_free(u32 order)
{
	u32 number;

	for (number = 0; order <= AEROSTAT_MAX_ORDER && number < aerostat_zones(); number++) {
		struct zone *zone = aerostat_zone(number);

		if (zone && populated_zone(zone) && READ_ONCE(zone->free_area[order].nr_free))
			return true;
	}
	return false;
}

/*
 * Scans one slice. PageBuddy and the order of a free block are valid only under the
 * zone's lock: without it a block that was just allocated could still be read as free.
 * Pages in the middle of a free block look like used ones.
 */
u64 aerostat_shim_scan(u32 number, u64 from, u32 order, u32 visits, u64 *found,
		       size_t *count, u64 *lock_ns)
{
	struct zone *zone = aerostat_zone(number);
	unsigned long step = 1UL << order, pfn, end, known = ULONG_MAX, flags;
	size_t capacity = *count;
	struct page *page = NULL;
	u64 start;

	*count = 0;
	*lock_ns = 0;
	if (!zone || order > AEROSTAT_MAX_ORDER)
		return ~0ULL;
	pfn = ALIGN((unsigned long)(from >> AEROSTAT_PAGE_SHIFT), step);
	spin_lock_irqsave(&zone->lock, flags);
	start = ktime_get_ns();
	end = zone_end_pfn(zone);
	for (; pfn < end && visits && *count < capacity; visits--) {
		unsigned long next = pfn + step;

		/* Memory is online or offline in units of at least a page block. */
		if (pfn / pageblock_nr_pages != known) {
			known = pfn / pageblock_nr_pages;
			page = pfn_to_online_page(pfn);
		} else if (page) {
			page = pfn_to_page(pfn);
		}
		if (!page) {
			pfn = ALIGN(pfn + 1, max(step, (unsigned long)pageblock_nr_pages));
			continue;
		}
		if (PageBuddy(page) && page_zone(page) == zone) {
			unsigned long block = page_private(page);

			if (block == order)
				found[(*count)++] = (u64)pfn << AEROSTAT_PAGE_SHIFT;
			else if (block > order && block <= AEROSTAT_MAX_ORDER)
				next = pfn + (1UL << block);
		}
		pfn = next;
	}
	*lock_ns = ktime_get_ns() - start;
	spin_unlock_irqrestore(&zone->lock, flags);
	return (u64)pfn << AEROSTAT_PAGE_SHIFT;
}

u64 aerostat_shim_free_pages(void)
{
	return (u64)global_zone_page_state(NR_FREE_PAGES) << AEROSTAT_PAGE_SHIFT;
}

u64 aerostat_shim_total_pages(void)
{
	return (u64)totalram_pages() << AEROSTAT_PAGE_SHIFT;
}

u64 aerostat_shim_reserved_pages(void)
{
	u64 pages = 0;
	u32 number;

	for (number = 0; number < aerostat_zones(); number++) {
		struct zone *zone = aerostat_zone(number);

		if (zone && populated_zone(zone))
			pages += high_wmark_pages(zone);
	}
	return pages << AEROSTAT_PAGE_SHIFT;
}

/* Cached + Buffers - Shmem of /proc/meminfo. */
u64 aerostat_shim_page_cache(void)
{
	long pages = global_node_page_state(NR_FILE_PAGES) -
		     global_node_page_state(NR_SHMEM) - total_swapcache_pages();

	return (u64)max(pages, 0L) << AEROSTAT_PAGE_SHIFT;
}

/* Slab of /proc/meminfo. */
u64 aerostat_shim_slab(void)
{
	return (u64)(global_node_page_state_pages(NR_SLAB_RECLAIMABLE_B) +
		     global_node_page_state_pages(NR_SLAB_UNRECLAIMABLE_B)) << AEROSTAT_PAGE_SHIFT;
}

/* Returns 0 or a positive error number. */
int aerostat_shim_drop_caches(u32 caches)
{
	char text[] = { '0' + (caches & 3), '\n' };
	struct file *file = filp_open(AEROSTAT_DROP_CACHES, O_WRONLY, 0);
	loff_t at = 0;
	ssize_t written;

	if (IS_ERR(file))
		return -PTR_ERR(file);
	written = kernel_write(file, text, sizeof(text), &at);
	filp_close(file, NULL);
	/* Page cache nodes and inodes are freed by RCU. Wait for that, so that the
	 * reported slab size includes the effect.
	 */
	rcu_barrier();
	if (written < 0)
		return -written;
	return written == sizeof(text) ? 0 : EIO;
}
