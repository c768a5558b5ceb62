//! Host memory behind guest memory, with guests that need no Linux.

use std::fs;
use std::time::Duration;

use lab::bare::{self, BareBuilder, BareGuest};

use crate::bare::{aerostat, boot, builder, on_a_kvm, receiver};
use crate::program::program;

/// MiB of a page in the host's pool, and of a guest.
const PAGE_MIB: u64 = 2;
const GUEST_MIB: u64 = 32;

/// Timeout of a process that refuses to start its guest.
const LIMIT: Duration = Duration::from_secs(20);

fn of_pool(what: &str) -> u64 {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{what}");
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

/// Output of a process that refuses to start its guest for lack of huge pages.
fn refusal(builder: BareBuilder) -> String {
    let mut guest = builder.start().unwrap();
    let status = guest.wait_for_end(LIMIT).unwrap();
    let said = guest.errors();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("vm.nr_hugepages="), "{said}");
    said
}

#[test]
fn missing_huge_pages_are_an_error_with_a_hint() {
    on_a_kvm("bare_host_memory::missing_huge_pages_are_an_error_with_a_hint", || {
        // More than the whole pool, whatever other processes use of it.
        let pages = of_pool("nr_hugepages") + GUEST_MIB / PAGE_MIB;
        let run = BareBuilder::command(program(), "run", "huge").unwrap();
        let memory = format!("{}MiB", pages * PAGE_MIB);
        let run = run.arguments(["--memory", &memory, "--shared", "--huge", "--kernel"]);
        let said = refusal(run.argument(bare::kernel().unwrap()));
        assert!(said.contains(&format!("{pages} huge pages of 2 MiB are needed")), "{said}");
        assert!(said.starts_with("error: host: ") || said.contains("host: "), "{said}");

        if of_pool("free_hugepages") - of_pool("resv_hugepages") >= GUEST_MIB / PAGE_MIB {
            println!("SKIPPED: receive and restore, because the pool has pages for a small guest");
            return;
        }
        let guest = boot("huge");
        let file = guest.directory().join("huge.snapshot");
        let (code, out, err) = aerostat(&guest, &["snapshot", "huge", file.to_str().unwrap()]);
        assert_eq!(code, Some(0), "{out}{err}");
        let restore = BareBuilder::command(program(), "restore", "restored").unwrap();
        refusal(restore.argument(&file).arguments(["--shared", "--huge"]));

        let (mut there, address) = receiver("huge", &["--shared", "--huge"]);
        let (code, _, err) = aerostat(&guest, &["migrate", "huge", &address, "--plain"]);
        assert_eq!(code, Some(1), "{err}");
        let is_logged = |text: &str| text.contains("vm.nr_hugepages=").then_some(());
        there.wait_for_error("what is missing", is_logged).unwrap();
        guest.power_off().unwrap();
    });
}

/// KiB of a process's mappings with a flag (proc_pid_smaps(5)).
fn flagged_kib(guest: &BareGuest, flag: &str) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{}/smaps", guest.pid())).unwrap();
    let (mut size, mut sum) = (0, 0);
    for line in maps.lines() {
        if let Some(rest) = line.strip_prefix("Size:") {
            size = rest.trim().trim_end_matches(" kB").parse().unwrap();
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            sum += if flags.split_whitespace().any(|word| word == flag) { size } else { 0 };
        }
    }
    sum
}

const HUGE: &str = "hg";

#[test]
fn ballooned_memory_is_not_backed_by_huge_pages() {
    on_a_kvm("bare_host_memory::ballooned_memory_is_not_backed_by_huge_pages", || {
        let mut guest = builder("thp").argument("--huge").boot().unwrap();
        let all = GUEST_MIB << 10;
        assert_eq!(flagged_kib(&guest, HUGE), all);
        guest.run("fill 8 12 1").unwrap();
        // 3 MiB and a page, from the end of memory down: two or three of the host's 2 MiB pages.
        guest.run("balloon 301").unwrap();
        let kept = all - flagged_kib(&guest, HUGE);
        assert!((0xc04..=4 * 2048).contains(&kept), "{kept} KiB");
        // A pause changes nothing.
        let file = guest.directory().join("thp.snapshot");
        let (code, out, err) = aerostat(&guest, &["snapshot", "thp", file.to_str().unwrap()]);
        assert_eq!(code, Some(0), "{out}{err}");
        assert_eq!(all - flagged_kib(&guest, HUGE), kept, "after a snapshot");
        // It also applies on the destination.
        let (mut there, address) = receiver("thp", &["--huge"]);
        let (code, out, err) = aerostat(&guest, &["migrate", "thp", &address, "--plain"]);
        assert_eq!(code, Some(0), "{out}{err}");
        there.run("balloon 0").unwrap();
        assert_eq!(flagged_kib(&there, HUGE), all);
        there.run("check 8 12 1").unwrap();
        there.power_off().unwrap();
    });
}
