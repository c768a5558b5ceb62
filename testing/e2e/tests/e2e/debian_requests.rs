//! Requests in unmodified Debian kernels, with a balloon device inside the guest: no VMM for them
//! has a request queue.

use std::fs::File;
use std::time::{Duration, Instant};

use lab::debian::{self, Release};
use lab::{Guest, guest_build};

/// Memory of the guests, in MiB: emulation is slow.
const MEMORY_MIB: u64 = 1024;

/// What is read into the page cache, in MiB.
const CACHED_MIB: u64 = 128;

/// What a hold leaves free, and what the guest then allocates, in MiB.
const RESERVE_MIB: u64 = 200;
const NEEDED_MIB: u64 = 400;

/// Pages that the guest may allocate meanwhile.
const NOISE_PAGES: u64 = 1024;

const PAGES_PER_MIB: u64 = 256;

/// Timeout of an answer in emulation, on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

const PARAMETERS: &str = "/sys/module/lab_balloon/parameters";

/// Commands and outcomes of docs/protocol.md.
const DROP_CACHES: u32 = 1;
const REPORT_FREE: u32 = 2;
const HOLD_FREE: u32 = 3;
const RELEASE_HOLD: u32 = 4;
const MORE: u64 = 0;
const DONE: u64 = 1;
const UNKNOWN_COMMAND: u64 = 3;
const BAD_ARGUMENT: u64 = 4;
const HOLD_LOST: u64 = 6;
const BUSY: u64 = 7;

#[test]
fn debian_6_12_carries_out_requests() {
    carries_out_requests(Release::Cloud6_12);
}

#[test]
fn debian_6_1_carries_out_requests() {
    carries_out_requests(Release::Cloud6_1);
}

fn carries_out_requests(release: Release) {
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    File::create(&disk).unwrap().set_len((CACHED_MIB + 1) << 20).unwrap();
    let kernel = debian::kernel(release).unwrap();
    let tree = kernel.tree().unwrap();
    let own = guest_build::balloon_module(&tree).unwrap();
    let device = guest_build::lab_balloon_module(&tree).unwrap();
    let needed = kernel.modules(&["virtio_pci", "virtio_blk"]).unwrap();
    let mut guest = Guest::qemu(&kernel)
        .memory_mib(MEMORY_MIB)
        .modules(&needed)
        .modules([&own, &device])
        .kernel_argument("ignore_loglevel")
        .machine_arguments(["-drive".to_owned(), drive(&disk)])
        .machine_arguments(["-device", "virtio-blk-pci,drive=disk"])
        .boot()
        .unwrap();
    guest.load(&needed).unwrap();
    guest.load(&[device, own]).unwrap();

    drops_caches(&mut guest);
    reports_free(&mut guest);
    holds_free(&mut guest);
    assert_eq!(request(&mut guest, 77, 0).outcome, UNKNOWN_COMMAND);
    assert_eq!(request(&mut guest, DROP_CACHES, 4).outcome, BAD_ARGUMENT);

    // The driver unloads with a hold, which ends.
    request(&mut guest, HOLD_FREE, RESERVE_MIB * PAGES_PER_MIB);
    guest.run("rmmod aerostat_balloon").unwrap();
    let free_mib = number(&mut guest, "free-mib");
    assert!(free_mib > RESERVE_MIB * 2, "{free_mib}");
    let log = guest.console_log();
    assert!(log.contains("balloon ready: page bitmaps, takes requests"), "{log}");
    for word in ["WARNING", "BUG", "Oops", "refused"] {
        assert!(!log.contains(word), "{word} in\n{log}");
    }
    assert!(guest.power_off().unwrap().success());
}

fn drops_caches(guest: &mut Guest) {
    guest.run(&format!("read-file /dev/vda {CACHED_MIB}")).unwrap();
    let both = request(guest, DROP_CACHES, 3);
    println!("drop caches: {both:?}");
    let [cache_before, cache_after, slab_before, slab_after] = both.values;
    assert_eq!(both.outcome, DONE);
    assert!(cache_before >= CACHED_MIB * PAGES_PER_MIB, "{both:?}");
    assert!(cache_before - cache_after >= CACHED_MIB * PAGES_PER_MIB * 98 / 100, "{both:?}");
    assert!(0 < slab_after && slab_after <= slab_before, "{both:?}");
}

fn reports_free(guest: &mut Guest) {
    let all = request(guest, REPORT_FREE, 12);
    println!("report: {all:?}");
    let [named, free, _, _] = all.values;
    assert_eq!((all.outcome, named), (DONE, all.named_pages));
    assert!(named >= free * 98 / 100, "{all:?}");
    assert!(all.used_pages <= NOISE_PAGES, "{all:?}");
    let large = request(guest, REPORT_FREE, 21);
    assert!(
        large.named_pages <= all.named_pages && large.named_pages.is_multiple_of(512),
        "{large:?}"
    );
}

fn holds_free(guest: &mut Guest) {
    let reserve = RESERVE_MIB * PAGES_PER_MIB;
    let held = request(guest, HOLD_FREE, reserve);
    println!("hold: {held:?}");
    assert_eq!((held.outcome, held.values[0]), (DONE, held.named_pages));
    let left_mib = number(guest, "free-mib");
    assert!(left_mib.abs_diff(RESERVE_MIB) <= 8, "{left_mib}");
    assert_eq!(request(guest, HOLD_FREE, reserve).outcome, BUSY);
    assert_eq!(request(guest, RELEASE_HOLD, held.id + 1).outcome, BAD_ARGUMENT);
    let released = request(guest, RELEASE_HOLD, held.id);
    assert_eq!((released.outcome, released.values[0]), (DONE, held.values[0]));

    let held = request(guest, HOLD_FREE, reserve);
    assert_eq!(held.outcome, DONE);
    let reply = guest.run(&format!("pressure {NEEDED_MIB} 0")).unwrap().text;
    assert_eq!(reply, format!("taken_mib={NEEDED_MIB} end=complete"));
    let lost = answer(guest);
    assert_eq!((lost.id, lost.outcome, lost.values[0]), (held.id, HOLD_LOST, held.values[0]));
    guest.run(&format!("fill data {NEEDED_MIB} 1")).unwrap();
    assert_eq!(number(guest, &format!("verify data {NEEDED_MIB} 1")), 0);
    guest.run("drop data").unwrap();
}

/// State of the newest request, from the device.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code, reason = "printed")]
struct Answer {
    id: u64,
    outcome: u64,
    values: [u64; 4],
    named_pages: u64,
    used_pages: u64,
    answers: u64,
    elapsed_ns: u64,
}

fn request(guest: &mut Guest, command: u32, argument: u64) -> Answer {
    guest.run(&format!("write {PARAMETERS}/ask {command} {argument}")).unwrap();
    let end = Instant::now() + LIMIT;
    loop {
        let now = answer(guest);
        if now.id != 0 && now.outcome != MORE {
            return now;
        }
        assert!(Instant::now() < end, "no answer to {command}: {now:?}");
    }
}

fn answer(guest: &mut Guest) -> Answer {
    let line = guest.run(&format!("cat {PARAMETERS}/answer")).unwrap().lines.join("");
    let words: Vec<u64> = line.split(' ').map(|word| word.parse().unwrap()).collect();
    let &[id, outcome, a, b, c, d, named_pages, used_pages, answers, elapsed_ns] = words.as_slice()
    else {
        panic!("{line}")
    };
    Answer { id, outcome, values: [a, b, c, d], named_pages, used_pages, answers, elapsed_ns }
}

fn number(guest: &mut Guest, command: &str) -> u64 {
    let text = guest.run(command).unwrap().text;
    text.parse().unwrap_or_else(|_| panic!("{command}: {text}"))
}

fn drive(disk: &std::path::Path) -> String {
    format!("file={},if=none,id=disk,format=raw,read-only=on", disk.display())
}
