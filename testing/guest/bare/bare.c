// A guest without an operating system, for tests of the VMM. It needs no interrupts, paging or
// clock, so it also runs on a KVM that cannot run Linux. It boots in milliseconds.
//
// It reads commands from the serial port and answers each with one line, "ok ..." or "error ...".
// Numbers are hexadecimal without a prefix.
//
//   ping N              answers N
//   fill MIB COUNT SEED writes to each page of a range of memory
//   check MIB COUNT SEED  verifies them; answers the first page that differs
//   zero MIB COUNT      answers how many pages of a range read as zeros
//   balloon PAGES       inflates or deflates to PAGES pages, from the end of memory down
//   target              answers the balloon device's target
//   follow 0|1          follows the balloon device's target, without a command
//   tick 0|1            prints "tick N" repeatedly
//   busy MIB COUNT      writes to the pages of that range repeatedly (0 0 ends it)
//   flood BYTES         prints BYTES bytes
//   cpuid LEAF SUBLEAF  answers EAX EBX ECX EDX
//   read ADDRESS        answers the 32 bits at a physical address
//   write ADDRESS VALUE
//   disk DEVICE KIND SECTOR  sends a request (virtio 1.2, 5.2.6; 0 reads, 1 writes, 4 flushes) of a
//                       sector to device 1 or above, and does not wait for its completion
//   done                answers how many requests have completed
//   status              answers the status of the last request (0 done, 1 failed)
//   reset DEVICE        resets a device
//   off                 powers off
//
// Memory from 1 MiB to FIRST_FREE_MIB belongs to the guest itself.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define PAGE_BYTES 4096u
#define MIB (1u << 20)
#define PAGES_PER_MIB (MIB / PAGE_BYTES)

// 16550 (ports of COM1).
#define SERIAL_DATA 0x3f8
#define SERIAL_STATUS 0x3fd
#define STATUS_RECEIVED 1

// SLEEP_CONTROL_REG of the VMM's ACPI tables: SLP_TYP 5, SLP_EN.
#define SLEEP_CONTROL 0x600
#define POWER_OFF (5 << 2 | 1 << 5)

static inline void out8(u16 port, u8 value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline u8 in8(u16 port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline u32 load(u32 address)
{
	return *(volatile u32 *)address;
}

static inline void store(u32 address, u32 value)
{
	*(volatile u32 *)address = value;
}

static void print(const char *text)
{
	while (*text)
		out8(SERIAL_DATA, *text++);
}

static void print_hex(u32 value)
{
	int shift = 28;

	while (shift > 0 && !(value >> shift))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		out8(SERIAL_DATA, "0123456789abcdef"[value >> shift & 15]);
}

static void answer(u32 value)
{
	print("ok ");
	print_hex(value);
	print("\n");
}

// Virtio over MMIO (virtio 1.2, 4.2.2), device 0 of the VMM.
#define BALLOON 0xc0000000u
#define MAGIC 0x000
#define DEVICE_ID 0x008
#define DRIVER_FEATURES 0x020
#define DRIVER_FEATURES_SEL 0x024
#define QUEUE_SEL 0x030
#define QUEUE_NUM 0x038
#define QUEUE_READY 0x044
#define QUEUE_NOTIFY 0x050
#define STATUS 0x070
#define QUEUE_DESC 0x080
#define QUEUE_DRIVER 0x090
#define QUEUE_DEVICE 0x0a0
#define CONFIG_NUM_PAGES 0x100
#define CONFIG_ACTUAL 0x104

#define MAGIC_VALUE 0x74726976
#define BALLOON_ID 5
#define DRIVER_OK 15 // with ACKNOWLEDGE, DRIVER and FEATURES_OK
#define FEATURES_OK 11
#define INFLATE 0
#define DEFLATE 1
#define QUEUES 2
#define QUEUE_SIZE 4
#define PFNS_PER_MESSAGE 256u

struct queue {
	_Alignas(16) struct { u64 address; u32 bytes; u16 flags, next; } descriptors[QUEUE_SIZE];
	_Alignas(4) struct { u16 flags, index, ring[QUEUE_SIZE]; } available;
	_Alignas(4) struct { u16 flags, index; struct { u32 id, bytes; } ring[QUEUE_SIZE]; } used;
};

static volatile struct queue queues[QUEUES];
static volatile u32 pfns[PFNS_PER_MESSAGE];
static u32 memory_end, balloon_pages;
static int has_balloon;

static void balloon_start(void)
{
	if (load(BALLOON + MAGIC) != MAGIC_VALUE || load(BALLOON + DEVICE_ID) != BALLOON_ID)
		return;
	store(BALLOON + STATUS, 0);
	store(BALLOON + STATUS, 3);
	// VERSION_1 and nothing else.
	store(BALLOON + DRIVER_FEATURES_SEL, 1);
	store(BALLOON + DRIVER_FEATURES, 1);
	store(BALLOON + DRIVER_FEATURES_SEL, 0);
	store(BALLOON + DRIVER_FEATURES, 0);
	store(BALLOON + STATUS, FEATURES_OK);
	for (int index = 0; index < QUEUES; index++) {
		volatile struct queue *queue = &queues[index];

		store(BALLOON + QUEUE_SEL, index);
		store(BALLOON + QUEUE_NUM, QUEUE_SIZE);
		store(BALLOON + QUEUE_DESC, (u32)queue->descriptors);
		store(BALLOON + QUEUE_DESC + 4, 0);
		store(BALLOON + QUEUE_DRIVER, (u32)&queue->available);
		store(BALLOON + QUEUE_DRIVER + 4, 0);
		store(BALLOON + QUEUE_DEVICE, (u32)&queue->used);
		store(BALLOON + QUEUE_DEVICE + 4, 0);
		store(BALLOON + QUEUE_READY, 1);
	}
	store(BALLOON + STATUS, DRIVER_OK);
	has_balloon = 1;
}

// Sends `count` pages starting at `first`, and waits until the device has returned the buffer.
static void balloon_send(int index, u32 first, u32 count)
{
	volatile struct queue *queue = &queues[index];
	u16 next = queue->available.index;

	for (u32 page = 0; page < count; page++)
		pfns[page] = first + page;
	queue->descriptors[0].address = (u32)pfns;
	queue->descriptors[0].bytes = count * sizeof(*pfns);
	queue->descriptors[0].flags = 0;
	queue->available.ring[next % QUEUE_SIZE] = 0;
	__sync_synchronize();
	queue->available.index = next + 1;
	__sync_synchronize();
	store(BALLOON + QUEUE_NOTIFY, index);
	while (queue->used.index != (u16)(next + 1))
		;
}

// The balloon has the last pages of memory: its page `n` is the n-th from the end.
static void balloon_set(u32 pages)
{
	u32 last = memory_end / PAGE_BYTES;

	while (has_balloon && balloon_pages != pages) {
		int grows = balloon_pages < pages;
		u32 count = grows ? pages - balloon_pages : balloon_pages - pages;

		if (count > PFNS_PER_MESSAGE)
			count = PFNS_PER_MESSAGE;
		if (grows) {
			balloon_pages += count;
			balloon_send(INFLATE, last - balloon_pages, count);
		} else {
			balloon_send(DEFLATE, last - balloon_pages, count);
			balloon_pages -= count;
		}
		store(BALLOON + CONFIG_ACTUAL, balloon_pages);
	}
}

// One disk at a time. The first request starts the device.
#define DEVICE_BYTES 0x1000u
#define BLOCK_ID 2
#define SECTOR_BYTES 512u
#define HAS_NEXT 1
#define DEVICE_WRITES 2
#define READS 0
#define FLUSHES 4
#define NO_STATUS 0xff

static volatile struct queue disk_queue;
static volatile struct { u32 kind, reserved; u64 sector; } disk_request;
static volatile u8 disk_data[SECTOR_BYTES], disk_status;
static u32 disk_started;

static int disk_start(u32 base)
{
	if (load(base + MAGIC) != MAGIC_VALUE || load(base + DEVICE_ID) != BLOCK_ID)
		return 0;
	store(base + STATUS, 0);
	disk_queue.available.index = disk_queue.used.index = 0;
	store(base + STATUS, 3);
	store(base + DRIVER_FEATURES_SEL, 1);
	store(base + DRIVER_FEATURES, 1);
	store(base + DRIVER_FEATURES_SEL, 0);
	store(base + DRIVER_FEATURES, 1 << 9); // VIRTIO_BLK_F_FLUSH
	store(base + STATUS, FEATURES_OK);
	store(base + QUEUE_SEL, 0);
	store(base + QUEUE_NUM, QUEUE_SIZE);
	store(base + QUEUE_DESC, (u32)disk_queue.descriptors);
	store(base + QUEUE_DESC + 4, 0);
	store(base + QUEUE_DRIVER, (u32)&disk_queue.available);
	store(base + QUEUE_DRIVER + 4, 0);
	store(base + QUEUE_DEVICE, (u32)&disk_queue.used);
	store(base + QUEUE_DEVICE + 4, 0);
	store(base + QUEUE_READY, 1);
	store(base + STATUS, DRIVER_OK);
	disk_started = base;
	return 1;
}

static void disk_send(u32 device, u32 kind, u32 sector)
{
	u32 base = BALLOON + device * DEVICE_BYTES, data = kind == FLUSHES ? 2 : 1;
	u16 next;

	if (disk_started != base && !disk_start(base)) {
		print("error no disk\n");
		return;
	}
	next = disk_queue.available.index;
	disk_request.kind = kind;
	disk_request.sector = sector;
	disk_status = NO_STATUS;
	disk_queue.descriptors[0].address = (u32)&disk_request;
	disk_queue.descriptors[0].bytes = sizeof(disk_request);
	disk_queue.descriptors[0].flags = HAS_NEXT;
	disk_queue.descriptors[0].next = data;
	disk_queue.descriptors[1].address = (u32)disk_data;
	disk_queue.descriptors[1].bytes = SECTOR_BYTES;
	disk_queue.descriptors[1].flags = HAS_NEXT | (kind == READS ? DEVICE_WRITES : 0);
	disk_queue.descriptors[1].next = 2;
	disk_queue.descriptors[2].address = (u32)&disk_status;
	disk_queue.descriptors[2].bytes = 1;
	disk_queue.descriptors[2].flags = DEVICE_WRITES;
	disk_queue.available.ring[next % QUEUE_SIZE] = 0;
	__sync_synchronize();
	disk_queue.available.index = next + 1;
	__sync_synchronize();
	store(base + QUEUE_NOTIFY, 0);
	print("ok\n");
}

// The value at three places of a page. Never 0.
static u32 pattern(u32 page, u32 place, u32 seed)
{
	return ((page * 3 + place + 1) * 2654435761u ^ seed * 40503u) | 1;
}

static const u32 places[] = { 0, PAGE_BYTES / 2, PAGE_BYTES - 4 };

static void fill(u32 mib, u32 count, u32 seed)
{
	for (u32 page = mib * PAGES_PER_MIB; page < (mib + count) * PAGES_PER_MIB; page++)
		for (u32 place = 0; place < 3; place++)
			store(page * PAGE_BYTES + places[place], pattern(page, place, seed));
	print("ok\n");
}

static void check(u32 mib, u32 count, u32 seed)
{
	for (u32 page = mib * PAGES_PER_MIB; page < (mib + count) * PAGES_PER_MIB; page++)
		for (u32 place = 0; place < 3; place++) {
			u32 found = load(page * PAGE_BYTES + places[place]);

			if (found != pattern(page, place, seed)) {
				print("error page ");
				print_hex(page);
				print(" has ");
				print_hex(found);
				print("\n");
				return;
			}
		}
	print("ok\n");
}

static void count_zeros(u32 mib, u32 count)
{
	u32 zeros = 0;

	for (u32 page = mib * PAGES_PER_MIB; page < (mib + count) * PAGES_PER_MIB; page++) {
		u32 any = 0;

		for (u32 place = 0; place < 3; place++)
			any |= load(page * PAGE_BYTES + places[place]);
		zeros += !any;
	}
	answer(zeros);
}

static u32 ticks, ticking, following, busy_mib, busy_count, busy_page;

static void cpuid(u32 leaf, u32 subleaf)
{
	u32 a, b, c, d;

	__asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(subleaf));
	print("ok ");
	print_hex(a);
	print(" ");
	print_hex(b);
	print(" ");
	print_hex(c);
	print(" ");
	print_hex(d);
	print("\n");
}

static int is(const char *word, const char *name)
{
	while (*word && *word == *name)
		word++, name++;
	return *word == *name;
}

// Splits a line into a command and up to three numbers, and executes it.
static void execute(char *line)
{
	u32 number[3] = { 0, 0, 0 };
	char *at = line;

	for (int index = -1; *at; index++) {
		while (*at && *at != ' ') {
			u32 digit = *at <= '9' ? *at - '0' : (*at | 32) - 'a' + 10;

			if (index >= 0 && index < 3)
				number[index] = number[index] << 4 | (digit & 15);
			at++;
		}
		while (*at == ' ')
			*at++ = 0;
	}
	if (is(line, "ping")) {
		answer(number[0]);
	} else if (is(line, "fill")) {
		fill(number[0], number[1], number[2]);
	} else if (is(line, "check")) {
		check(number[0], number[1], number[2]);
	} else if (is(line, "zero")) {
		count_zeros(number[0], number[1]);
	} else if (is(line, "balloon")) {
		balloon_set(number[0]);
		answer(balloon_pages);
	} else if (is(line, "target")) {
		answer(has_balloon ? load(BALLOON + CONFIG_NUM_PAGES) : 0);
	} else if (is(line, "follow")) {
		following = number[0];
		print("ok\n");
	} else if (is(line, "tick")) {
		ticking = number[0];
		print("ok\n");
	} else if (is(line, "busy")) {
		busy_mib = number[0];
		busy_count = number[1];
		print("ok\n");
	} else if (is(line, "flood")) {
		for (u32 byte = 1; byte <= number[0]; byte++)
			out8(SERIAL_DATA, byte % 64 ? 'x' : '\n');
		print("\nok\n");
	} else if (is(line, "cpuid")) {
		cpuid(number[0], number[1]);
	} else if (is(line, "read")) {
		answer(load(number[0]));
	} else if (is(line, "write")) {
		store(number[0], number[1]);
		print("ok\n");
	} else if (is(line, "disk")) {
		disk_send(number[0], number[1], number[2]);
	} else if (is(line, "done")) {
		answer(disk_queue.used.index);
	} else if (is(line, "status")) {
		answer(disk_status);
	} else if (is(line, "reset")) {
		store(BALLOON + number[0] * DEVICE_BYTES + STATUS, 0);
		disk_started = 0;
		print("ok\n");
	} else if (is(line, "off")) {
		out8(SLEEP_CONTROL, POWER_OFF);
	} else {
		print("error unknown command\n");
	}
}

static void idle(void)
{
	if (following)
		balloon_set(load(BALLOON + CONFIG_NUM_PAGES));
	if (busy_count) {
		busy_page = (busy_page + 1) % (busy_count * PAGES_PER_MIB);
		store((busy_mib * PAGES_PER_MIB + busy_page) * PAGE_BYTES, ticks);
	}
	if (ticking) {
		print("tick ");
		print_hex(++ticks);
		print("\n");
	}
	for (volatile u32 wait = 0; wait < 1000; wait++)
		;
}

// Fields of PVH's start info (Xen's arch-x86/hvm/start_info.h) and of its memory map.
#define MEMORY_MAP 40
#define MEMORY_MAP_ENTRIES 48
#define ENTRY_BYTES 24
#define KIND_RAM 1

void bare_main(u32 start_info)
{
	static char line[128];
	u32 map = load(start_info + MEMORY_MAP), used = 0;

	for (u32 entry = 0; entry < load(start_info + MEMORY_MAP_ENTRIES); entry++) {
		u32 at = map + entry * ENTRY_BYTES, end = load(at) + load(at + 8);

		if (load(at + 16) == KIND_RAM && load(at + 4) == 0 && end > memory_end)
			memory_end = end;
	}
	balloon_start();
	print("ready ");
	print_hex(memory_end / MIB);
	print("\n");
	for (;;) {
		u8 byte;

		if (!(in8(SERIAL_STATUS) & STATUS_RECEIVED)) {
			idle();
			continue;
		}
		byte = in8(SERIAL_DATA);
		if (byte == '\n' || byte == '\r') {
			line[used] = 0;
			if (used)
				execute(line);
			used = 0;
		} else if (used + 1 < sizeof(line)) {
			line[used++] = byte;
		}
	}
}
