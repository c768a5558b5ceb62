//! What backs a guest's memory, with guests that need no Linux.

use std::fs;
use std::time::Duration;

use lab::bare::{self, BareBuilder, BareGuest};

use crate::bare::{aerostat, boot, builder, on_a_kvm, receiver};
use crate::program::program;

/// MiB of a page of the host's pool, and of a guest.
const PAGE_MIB: u64 = 2;
const GUEST_MIB: u64 = 32;

/// For a process that does not begin a guest.
const LIMIT: Duration = Duration::from_secs(20);

fn of_pool(what: &str) -> u64 {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{what}");
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

/// A process that refuses to begin its guest for lack of huge pages: what it said.
fn refusal(builder: BareBuilder) -> String {
    let mut guest = builder.start().unwrap();
    let status = guest.wait_for_end(LIMIT).unwrap();
    let said = guest.errors();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("vm.nr_hugepages="), "{said}");
    said
}

#[test]
fn a_guest_on_huge_pages_that_are_not_there_is_refused_in_words() {
    on_a_kvm(
        "bare_host_memory::a_guest_on_huge_pages_that_are_not_there_is_refused_in_words",
        || {
            // More than the whole pool, whoever else uses it.
            let pages = of_pool("nr_hugepages") + GUEST_MIB / PAGE_MIB;
            let run = BareBuilder::command(program(), "run", "huge").unwrap();
            let memory = format!("{}MiB", pages * PAGE_MIB);
            let run = run.arguments(["--memory", &memory, "--shared", "--huge", "--kernel"]);
            let said = refusal(run.argument(bare::kernel().unwrap()));
            assert!(said.contains(&format!("{pages} huge pages of 2 MiB are needed")), "{said}");
            assert!(said.starts_with("error: host: ") || said.contains("host: "), "{said}");

            if of_pool("free_hugepages") - of_pool("resv_hugepages") >= GUEST_MIB / PAGE_MIB {
                println!("SKIPPED: receive and restore, since a small guest finds huge pages here");
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
            let is_told = |text: &str| text.contains("vm.nr_hugepages=").then_some(());
            there.wait_for_error("what is missing", is_told).unwrap();
            guest.power_off().unwrap();
        },
    );
}

/// KiB of a process's memory whose mappings have a flag (proc_pid_smaps(5)).
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
fn memory_with_pages_in_the_balloon_is_kept_from_huge_pages() {
    on_a_kvm("bare_host_memory::memory_with_pages_in_the_balloon_is_kept_from_huge_pages", || {
        let mut guest = builder("thp").argument("--huge").boot().unwrap();
        let all = GUEST_MIB << 10;
        assert_eq!(flagged_kib(&guest, HUGE), all);
        guest.ask("fill 8 12 1").unwrap();
        // 3 MiB and a page, from the end of memory down: three of the host's 2 MiB at most, and
        // two at least.
        guest.ask("balloon 301").unwrap();
        let kept = all - flagged_kib(&guest, HUGE);
        assert!((0xc04..=4 * 2048).contains(&kept), "{kept} KiB");
        // A pause leaves it so.
        let file = guest.directory().join("thp.snapshot");
        let (code, out, err) = aerostat(&guest, &["snapshot", "thp", file.to_str().unwrap()]);
        assert_eq!(code, Some(0), "{out}{err}");
        assert_eq!(all - flagged_kib(&guest, HUGE), kept, "after a snapshot");
        // It moves with the guest.
        let (mut there, address) = receiver("thp", &["--huge"]);
        let (code, out, err) = aerostat(&guest, &["migrate", "thp", &address, "--plain"]);
        assert_eq!(code, Some(0), "{out}{err}");
        there.ask("balloon 0").unwrap();
        assert_eq!(flagged_kib(&there, HUGE), all);
        there.ask("check 8 12 1").unwrap();
        there.power_off().unwrap();
    });
}
