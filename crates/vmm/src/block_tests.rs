//! Tests of the disk, from the driver's side of its virtqueue.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Instant;

use guest_ring::{Buffer, GuestRing, INDIRECT, NEXT, WRITE, write_descriptor};
use proptest::prelude::*;
use tempfile::{NamedTempFile, TempDir};
use virtio_bindings::virtio_blk::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::*;

const MEMORY_BYTES: usize = 1 << 20;
const RING: u64 = 0x1000;
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x8100;
const DATA: u64 = 0x1_0000;

/// Sectors of a disk.
const SECTORS: u64 = 64;

/// A status that the device never writes.
const UNTOUCHED: u8 = 0xee;

/// Timeout of a request, long enough for a busy host.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

struct Guest {
    memory: Ram,
    disk: Block,
    file: File,
    ring: GuestRing,
    queue: Queue,
    notify_fd: EventFd,
    path: NamedTempFile,
}

impl Guest {
    fn new(read_only: bool) -> Self {
        let path = NamedTempFile::new().unwrap();
        let file = path.as_file().try_clone().unwrap();
        file.write_all_at(&pattern(SECTORS * 512, 1), 0).unwrap();
        let options = DiskOptions { path: path.path().into(), read_only };
        Self::with(DiskFile::open(&options).unwrap(), file, path)
    }

    fn with(disk: DiskFile, file: File, path: NamedTempFile) -> Self {
        let memory = Ram::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        let mut disk = Block::new(&Arc::new(disk), 0, memory.clone()).unwrap();
        let notify_fd = EventFd::new(0).unwrap();
        disk.set_notify_fds(&[notify_fd.try_clone().unwrap()]);
        disk.reset(disk.features());
        let ring = GuestRing::new(RING, 16);
        let queue = ring.queue();
        Self { memory, disk, file, ring, queue, notify_fd, path }
    }

    /// Sends a request and serves the virtqueue until it completes. Returns its status and the
    /// number of bytes written.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let header = [u64::from(kind).to_le_bytes(), sector.to_le_bytes()].concat();
        self.memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
        let chain =
            [&[Buffer::readable(HEADER, 16)], data, &[Buffer::writable(STATUS, 1)]].concat();
        self.ring.send(&self.memory, &chain);
        let written = self.serve();
        (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), written)
    }

    /// Serves the virtqueue like the device loop: at once, and at each notification.
    fn serve(&mut self) -> u32 {
        let end = Instant::now() + REQUEST_TIMEOUT;
        loop {
            let served = self.disk.serve(0, &self.memory, &mut self.queue);
            let done = self.ring.take_used(&self.memory);
            if let Some(used) = done {
                assert!(matches!(served, Served::Done { notify: true, .. }), "{served:?}");
                return used.written_bytes;
            }
            assert_eq!(served, Served::Done { notify: false, more: false });
            assert!(Instant::now() < end);
            self.notify_fd.read().unwrap();
        }
    }

    /// Serves the virtqueue until `count` chains have returned. Returns the bytes written to each.
    fn serve_all(&mut self, count: usize) -> Vec<u32> {
        let end = Instant::now() + REQUEST_TIMEOUT;
        let mut written = Vec::new();
        loop {
            let served = self.disk.serve(0, &self.memory, &mut self.queue);
            assert!(matches!(served, Served::Done { more: false, .. }), "{served:?}");
            written.extend(std::iter::from_fn(|| self.ring.take_used(&self.memory)));
            if written.len() >= count {
                return written.iter().map(|used| used.written_bytes).collect();
            }
            assert!(Instant::now() < end);
            self.notify_fd.read().unwrap();
        }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn on_disk(&self, sector: u64, sectors: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(sectors * 512).unwrap()];
        self.file.read_exact_at(&mut bytes, sector * 512).unwrap();
        bytes
    }

    fn config<const N: usize>(&mut self, at: usize) -> [u8; N] {
        let mut bytes = [0xaa; N];
        self.disk.read_config(u32::try_from(at).unwrap(), &mut bytes);
        bytes
    }
}

/// Bytes without two equal sectors.
fn pattern(bytes: u64, seed: u64) -> Vec<u8> {
    let word = |at: u64| (at * 0x9e37_79b9 + seed).to_le_bytes();
    (0..bytes / 8).flat_map(word).collect()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// The status of a request (virtio 1.3, 5.2.6).
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

#[test]
fn writes_reach_the_file_and_reads_return_its_contents() {
    let mut guest = Guest::new(false);
    let data = pattern(3 * 512, 7);
    guest.put(DATA, &data);
    // Split at any place.
    let out = [Buffer::readable(DATA, 100), Buffer::readable(DATA + 100, 3 * 512 - 100)];
    assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 5, &out), (OK, 1));
    assert_eq!(guest.on_disk(5, 3), data);
    assert_eq!(guest.on_disk(4, 1), pattern(SECTORS * 512, 1)[4 * 512..5 * 512]);

    let into = [Buffer::writable(DATA + 0x4000, 4 * 512)];
    assert_eq!(guest.request(VIRTIO_BLK_T_IN, 4, &into), (OK, 4 * 512 + 1));
    assert_eq!(guest.get(DATA + 0x4000, 4 * 512), guest.on_disk(4, 4));
    assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    let id = [Buffer::writable(DATA, 20)];
    assert_eq!(guest.request(VIRTIO_BLK_T_GET_ID, 0, &id), (OK, 21));
    assert_eq!(guest.get(DATA, 15), b"aerostat-disk0\0");
}

#[test]
fn header_and_status_may_be_split_and_in_an_indirect_table() {
    let mut guest = Guest::new(false);
    let header = [u64::from(VIRTIO_BLK_T_IN).to_le_bytes(), 9u64.to_le_bytes()].concat();
    guest.put(HEADER, &header);
    let table = 0x9000;
    let buffers: Vec<(u64, u32, u16)> =
        vec![(HEADER, 3, 0), (HEADER + 3, 13, 0), (DATA, 512, WRITE), (DATA + 512, 513, WRITE)];
    for (index, (at, len, flags)) in (0u16..).zip(&buffers) {
        let next = if index < 3 { NEXT } else { 0 };
        let descriptor = Descriptor::new(*at, *len, flags | next, index + 1);
        assert!(write_descriptor(&guest.memory, table, index, descriptor));
    }
    let whole = Descriptor::new(table, 4 * 16, INDIRECT, 0);
    assert!(guest.ring.write_descriptor(&guest.memory, 0, whole));
    guest.put(DATA + 1024, &[UNTOUCHED]);
    guest.ring.publish(&guest.memory, 0);
    assert_eq!(guest.serve(), 1025);
    assert_eq!(guest.get(DATA, 1024), guest.on_disk(9, 2));
    assert_eq!(guest.get(DATA + 1024, 1), [OK]);
}

#[test]
fn invalid_requests_are_errors() {
    let mut guest = Guest::new(false);
    let before = guest.on_disk(0, SECTORS);
    let read = |len| [Buffer::writable(DATA, len)];
    let write = |len| [Buffer::readable(DATA, len)];
    for sector in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / 512] {
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, sector, &read(1024)), (IOERR, 0), "{sector}");
        assert_eq!(guest.request(VIRTIO_BLK_T_OUT, sector, &write(1024)), (IOERR, 0), "{sector}");
    }
    assert_eq!(guest.request(VIRTIO_BLK_T_IN, 0, &read(100)), (IOERR, 0));
    assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &write(513)), (IOERR, 0));
    let beyond = MEMORY_BYTES as u64 - 256;
    assert_eq!(guest.request(VIRTIO_BLK_T_IN, 0, &[Buffer::writable(beyond, 512)]), (IOERR, 0));
    assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &[Buffer::readable(!0, 512)]), (IOERR, 0));
    assert_eq!(guest.request(VIRTIO_BLK_T_GET_ID, 0, &read(19)), (IOERR, 0));
    assert_eq!(guest.request(VIRTIO_BLK_T_SCSI_CMD, 0, &read(512)), (UNSUPP, 0));
    assert_eq!(guest.request(0xffff_ffff, 0, &[]), (UNSUPP, 0));
    assert_eq!(guest.on_disk(0, SECTORS), before);
    // The disk still works.
    assert_eq!(guest.request(VIRTIO_BLK_T_IN, SECTORS - 1, &read(512)), (OK, 513));

    // A truncated file is the host's fault, and an I/O error in the guest.
    guest.file.set_len(512).unwrap();
    assert_eq!(guest.request(VIRTIO_BLK_T_IN, 1, &read(512)), (IOERR, 0));
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut guest = Guest::new(true);
    let before = guest.on_disk(0, SECTORS);
    assert_ne!(guest.disk.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(guest.disk.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    guest.put(DATA, &range(0, 8, 0));
    for (kind, bytes) in
        [(VIRTIO_BLK_T_OUT, 512), (VIRTIO_BLK_T_DISCARD, 16), (VIRTIO_BLK_T_WRITE_ZEROES, 16)]
    {
        let answer = guest.request(kind, 0, &[Buffer::readable(DATA, bytes)]);
        assert_eq!(answer, (IOERR, 0), "{kind}");
    }
    assert_eq!(guest.request(VIRTIO_BLK_T_IN, 0, &[Buffer::writable(DATA, 512)]), (OK, 513));
    assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(guest.on_disk(0, SECTORS), before);
}

#[test]
fn without_the_flush_feature_writes_are_synced_before_they_complete() {
    let path = NamedTempFile::new().unwrap();
    let file = path.as_file().try_clone().unwrap();
    let mut guest = Guest::with(DiskFile::that_cannot_sync(SECTORS), file, path);
    let data = [Buffer::readable(DATA, 512)];
    assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &data), (OK, 1));
    assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (IOERR, 0));
    let without = guest.disk.features() & !(1 << VIRTIO_BLK_F_FLUSH);
    guest.disk.restore_features(without);
    assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &data), (IOERR, 0));
}

#[test]
fn discarded_sectors_are_holes_and_zeros() {
    let mut guest = Guest::new(false);
    let blocks = guest.file.metadata().unwrap().blocks();
    guest.put(DATA, &[range(8, 8, 0), range(24, 8, 0)].concat());
    let two = [Buffer::readable(DATA, 32)];
    assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &two), (OK, 1));
    let zeros = vec![0; 8 * 512];
    assert_eq!([guest.on_disk(8, 8), guest.on_disk(24, 8)], [zeros.clone(), zeros.clone()]);
    assert!(guest.file.metadata().unwrap().blocks() < blocks);
    for flags in [0, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP] {
        guest.file.write_all_at(&pattern(SECTORS * 512, 1), 0).unwrap();
        guest.put(DATA, &range(40, 8, flags));
        let one = [Buffer::readable(DATA, 16)];
        assert_eq!(guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &one), (OK, 1));
        assert_eq!(guest.on_disk(40, 8), zeros);
        assert_eq!(guest.on_disk(48, 1), pattern(SECTORS * 512, 1)[48 * 512..49 * 512]);
    }

    let before = guest.on_disk(0, SECTORS);
    for (bytes, status) in [
        (range(SECTORS - 1, 2, 0), IOERR),
        (range(u64::MAX, 1, 0), IOERR),
        (range(0, 0, 0), IOERR),
        (range(0, DISCARD.sectors + 1, 0), IOERR),
        (range(0, 1, 1), UNSUPP),
        (range(0, 1, 2), UNSUPP),
        // One invalid range: nothing is done.
        ([range(0, 1, 0), range(SECTORS, 1, 0)].concat(), IOERR),
        (range(0, 1, 0)[..15].to_vec(), IOERR),
    ] {
        guest.put(DATA, &bytes);
        let buffer = [Buffer::readable(DATA, u32::try_from(bytes.len()).unwrap())];
        assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &buffer), (status, 0), "{bytes:?}");
    }
    let many = [Buffer::readable(DATA, (DISCARD.ranges + 1) * 16)];
    assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &many), (IOERR, 0));
    assert_eq!(guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &two), (IOERR, 0));
    assert_eq!(guest.on_disk(0, SECTORS), before);
}

#[test]
fn configuration_space_has_the_disks_size_and_limits() {
    let mut guest = Guest::new(false);
    assert_eq!(u64::from_le_bytes(guest.config(0)), SECTORS);
    assert_eq!(u32::from_le_bytes(guest.config(12)), SEG_MAX);
    assert_eq!(u32::from_le_bytes(guest.config(20)), 512);
    // On a file system with 4 KiB blocks: 2^3 blocks per physical block, no offset, min I/O 8.
    assert_eq!(guest.config::<4>(24), [3, 0, 8, 0]);
    assert_eq!(u32::from_le_bytes(guest.config(28)), 0);
    assert_eq!(u32::from_le_bytes(guest.config(36)), DISCARD.sectors);
    assert_eq!(u32::from_le_bytes(guest.config(44)), 8);
    assert_ne!(guest.disk.features() & 1 << VIRTIO_BLK_F_TOPOLOGY, 0);
    assert_eq!(guest.config::<8>(56), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(u32::from_le_bytes(guest.config(usize::MAX & 0xffff)), 0);
    guest.disk.write_config(0, &[0xff; 8]);
    assert_eq!(u64::from_le_bytes(guest.config(0)), SECTORS);
}

/// Byte offset of a sector.
fn index(sector: u64) -> usize {
    usize::try_from(sector * 512).unwrap()
}

/// Checks discard and write-zeroes on a host with a unit of 4 KiB.
fn check_ranges_on_whole_blocks(guest: &mut Guest) {
    let before = pattern(SECTORS * 512, 1);
    let cases = [(8, 8), (16, 24), (1, 1), (7, 2), (9, 30), (0, 64), (63, 1)];
    for (sector, sectors) in cases {
        for flags in [0, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP] {
            guest.file.write_all_at(&before, 0).unwrap();
            guest.put(DATA, &range(sector, sectors, flags));
            let one = [Buffer::readable(DATA, 16)];
            let answer = guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &one);
            assert_eq!(answer, (OK, 1), "zeros at {sector}, {sectors}");
            let (from, to) = (index(sector), index(sector + u64::from(sectors)));
            let mut expected = before.clone();
            expected[from..to].fill(0);
            assert!(guest.on_disk(0, SECTORS) == expected, "zeros at {sector}, {sectors}");
        }
        guest.file.write_all_at(&before, 0).unwrap();
        guest.put(DATA, &range(sector, sectors, 0));
        let answer = guest.request(VIRTIO_BLK_T_DISCARD, 0, &[Buffer::readable(DATA, 16)]);
        assert_eq!(answer, (OK, 1), "discard at {sector}, {sectors}");
        let (from, to) = (sector.next_multiple_of(8), (sector + u64::from(sectors)) / 8 * 8);
        let now = guest.on_disk(0, SECTORS);
        for at in 0..SECTORS {
            let bytes = index(at)..index(at + 1);
            let discarded = (from..to).contains(&at);
            let is_zeros = now[bytes.clone()].iter().all(|byte| *byte == 0);
            let stays = now[bytes.clone()] == before[bytes];
            assert!(
                stays || (discarded && is_zeros),
                "sector {at} after discarding {sector}, {sectors}"
            );
        }
    }
    // Partial blocks can be read and written.
    guest.put(DATA, &pattern(3 * 512, 7));
    assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 5, &[Buffer::readable(DATA, 3 * 512)]), (OK, 1));
    let into = [Buffer::writable(DATA + 0x4000, 512)];
    assert_eq!(guest.request(VIRTIO_BLK_T_IN, 6, &into), (OK, 513));
    assert_eq!(guest.get(DATA + 0x4000, 512), pattern(3 * 512, 7)[512..1024]);
    assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn partial_host_blocks_are_zeroed_but_need_not_be_discarded() {
    let path = NamedTempFile::new().unwrap();
    let file = path.as_file().try_clone().unwrap();
    file.write_all_at(&pattern(SECTORS * 512, 1), 0).unwrap();
    let options = DiskOptions { path: path.path().into(), read_only: false };
    let disk = DiskFile::open(&options).unwrap().in_units(4096);
    check_ranges_on_whole_blocks(&mut Guest::with(disk, file, path));
}

/// A loop device with 4,096-byte sectors; detached on drop.
struct LoopDevice(std::path::PathBuf);

impl LoopDevice {
    fn new(file: &std::path::Path) -> Option<Self> {
        let options = ["--find", "--show", "--sector-size", "4096"];
        let _alone = file::no_process_starts();
        let made = std::process::Command::new("losetup").args(options).arg(file).output();
        let made = made.ok().filter(|made| made.status.success())?;
        Some(Self(String::from_utf8(made.stdout).ok()?.trim().into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _alone = file::no_process_starts();
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_with_large_sectors_reports_them_and_serves_small_requests() {
    let path = NamedTempFile::new().unwrap();
    path.as_file().set_len(SECTORS * 512).unwrap();
    let Some(device) = LoopDevice::new(path.path()) else {
        eprintln!(
            "SKIPPED: no loop device of 4,096-byte sectors here (losetup, root): only the \
                   double of one was tried"
        );
        return;
    };
    let options = DiskOptions { path: device.0.clone(), read_only: false };
    let disk = DiskFile::open(&options).unwrap();
    // Through the same page cache as the disk.
    let file = File::options().read(true).write(true).open(&device.0).unwrap();
    let mut guest = Guest::with(disk, file, path);
    assert_eq!(u64::from_le_bytes(guest.config(0)), SECTORS);
    assert_eq!(u32::from_le_bytes(guest.config(20)), 4096);
    let granularity = u32::from_le_bytes(guest.config(44));
    assert!(granularity >= 8 && granularity.is_multiple_of(8), "{granularity}");
    assert!(u32::from_le_bytes(guest.config(36)).is_multiple_of(granularity));
    check_ranges_on_whole_blocks(&mut guest);
}

/// A driver reads the limits only once, so a migration must keep them.
#[test]
fn limits_of_the_source_are_kept_at_the_destination() {
    let mut guest = Guest::new(false);
    let source_limits = DiskLimits { block_bytes: 4096, ..guest.disk.file.limits() };
    guest.disk.file.keep_limits(source_limits);
    assert_eq!(u32::from_le_bytes(guest.config(20)), 4096);
    assert_eq!(guest.disk.file.describe(&|| Ok(())).unwrap().limits, source_limits);
}

#[test]
fn chains_without_a_status_are_returned_and_an_invalid_vring_stops() {
    let mut guest = Guest::new(false);
    guest.put(HEADER, &[0; 16]);
    let header = Buffer::readable(HEADER, 16);
    let status = Buffer::writable(STATUS, 1);
    let data = Buffer::writable(DATA, 512);
    for chain in [
        vec![],
        vec![header],
        vec![status],
        vec![Buffer::readable(HEADER, 15), status],
        vec![Buffer::readable(u64::MAX - 3, 16), status],
        // A readable buffer after a writable one.
        vec![header, data, Buffer::readable(DATA, 512), status],
        // More data than allowed.
        vec![header, Buffer::writable(DATA, 1 << 30), status],
    ] {
        guest.put(STATUS, &[UNTOUCHED]);
        guest.ring.send(&guest.memory, &chain);
        assert_eq!(guest.serve(), 0, "{chain:?}");
        assert_eq!(guest.get(STATUS, 1), [UNTOUCHED], "{chain:?}");
    }
    // Without an end: the last descriptor links to one outside the table.
    guest.put(STATUS, &[UNTOUCHED]);
    let head = guest.ring.send(&guest.memory, &[header, data, status]);
    let last = Descriptor::new(STATUS, 1, WRITE | NEXT, 16);
    guest.ring.write_descriptor(&guest.memory, (head + 2) % 16, last);
    assert_eq!((guest.serve(), guest.get(STATUS, 1)), (0, vec![UNTOUCHED]));

    // Made available more often than the vring has entries.
    let head = guest.ring.send(&guest.memory, &[header, data, status]);
    let mut served = Served::Done { notify: false, more: false };
    for _ in 0..64 {
        guest.ring.publish(&guest.memory, head);
        if guest.disk.in_flight < 16 {
            guest.disk.in_flight = 16;
        }
        served = guest.disk.serve(0, &guest.memory, &mut guest.queue);
        if served == Served::Broken {
            break;
        }
    }
    assert_eq!(served, Served::Broken);
    assert_eq!(guest.disk.in_flight, 0);
}

/// Makes `count` writes available, each to its own sector.
fn many_writes(guest: &mut Guest, count: u64) {
    for sector in 0..count {
        let at = HEADER + sector * 16;
        let header = [u64::from(VIRTIO_BLK_T_OUT).to_le_bytes(), sector.to_le_bytes()].concat();
        guest.put(at, &header);
        guest.put(DATA + sector * 512, &pattern(512, 100 + sector));
        let chain = [
            Buffer::readable(at, 16),
            Buffer::readable(DATA + sector * 512, 512),
            Buffer::writable(STATUS + sector, 1),
        ];
        guest.ring.send(&guest.memory, &chain);
    }
}

/// Requests in flight do not delay a pause: they stay in the vring until the guest is resumed, here
/// or on another host.
#[test]
fn a_pause_leaves_unfinished_requests_in_the_vring() {
    let mut guest = Guest::new(false);
    let before = guest.on_disk(0, 5);
    many_writes(&mut guest, 2);
    assert_eq!(guest.serve_all(2), [1, 1]);
    guest.disk.worker.interrupt();
    many_writes(&mut guest, 3);
    // An invalid request keeps its place in the order.
    guest.ring.send(&guest.memory, &[Buffer::readable(HEADER, 16)]);
    let served = guest.disk.serve(0, &guest.memory, &mut guest.queue);
    assert_eq!(served, Served::Done { notify: false, more: false });
    let returned = guest.disk.return_unused(0, &guest.memory, &mut guest.queue);
    assert_eq!(returned, Served::Done { notify: false, more: false });
    assert_eq!((guest.disk.in_flight, guest.queue.next_avail()), (0, 2));
    assert_eq!(guest.on_disk(2, 3), before[2 * 512..]);

    // Another machine continues with only the vring.
    let options = DiskOptions { path: guest.path.path().into(), read_only: false };
    let file = Arc::new(DiskFile::open(&options).unwrap());
    guest.disk = Block::new(&file, 0, guest.memory.clone()).unwrap();
    guest.disk.set_notify_fds(&[guest.notify_fd.try_clone().unwrap()]);
    assert_eq!(guest.serve_all(4), [1, 1, 1, 0]);
    for sector in 0..3 {
        assert_eq!(guest.on_disk(sector, 1), pattern(512, 100 + sector));
    }
    assert_eq!(guest.queue.next_avail(), 6);
}

#[test]
fn a_reset_drops_requests_in_flight() {
    let mut guest = Guest::new(false);
    many_writes(&mut guest, 5);
    guest.disk.serve(0, &guest.memory, &mut guest.queue);
    guest.disk.reset(0);
    assert_eq!(guest.disk.in_flight, 0);
    assert!(guest.disk.worker.take_done().is_empty());
}

#[test]
fn files_that_are_not_disks_are_refused() {
    let directory = TempDir::new().unwrap();
    let open = |name: &str, read_only| {
        let path = directory.path().join(name);
        DiskFile::open(&DiskOptions { path, read_only }).map(drop).unwrap_err().to_string()
    };
    assert!(open("nothing", false).contains("cannot read"));
    fs::write(directory.path().join("empty"), "").unwrap();
    assert!(open("empty", false).contains("0 bytes"));
    fs::write(directory.path().join("odd"), [0; 513]).unwrap();
    assert!(open("odd", true).starts_with("operator: "));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any chain is returned, or the vring is invalid; and the file keeps its size.
    #[test]
    fn any_chain_is_returned_once(
        chains in prop::collection::vec(
            (
                prop::sample::select(vec![0u32, 1, 4, 8, 11, 13, 99]),
                prop_oneof![0..SECTORS + 2, any::<u64>()],
                prop::collection::vec(
                    (prop_oneof![0u64..MEMORY_BYTES as u64, any::<u64>()],
                     prop_oneof![0u32..2048, Just(512), Just(16), any::<u32>()],
                     any::<bool>()),
                    0..6),
            ),
            1..12),
        read_only in any::<bool>(),
    ) {
        let mut guest = Guest::new(read_only);
        for (kind, sector, buffers) in chains {
            // The buffers do not overlap the request's header, status or vring.
            let buffers: Vec<_> = buffers
                .into_iter()
                .map(|(at, len, writable)| {
                    let at = if at < DATA { at + DATA } else { at };
                    Buffer { addr: at, len, writable }
                })
                .collect();
            let (status, written) = guest.request(kind, sector, &buffers);
            prop_assert!([OK, IOERR, UNSUPP, UNTOUCHED].contains(&status), "{status}");
            prop_assert_eq!(written > 0, status == OK);
            prop_assert_eq!(guest.file.metadata().unwrap().len(), SECTORS * 512);
        }
    }
}
