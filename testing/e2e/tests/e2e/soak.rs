//! `aerostat-lab soak` finds a planted corruption. `check` runs it without one, for some minutes
//! next to the fuzzing.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bench::Driver;
use bench::inflate::HostPages;
use bench::soak::plan::{PatternFile, Step};
use bench::soak::plan_for;

use crate::fixture::{LIMIT, guest_memory};
use crate::program::{lab_program, outcome};

/// The pattern that the guests' init writes into its files.
#[path = "../../../guest/init/src/pattern.rs"]
#[allow(dead_code, reason = "init uses more of it")]
mod pattern;

/// Memory of the guest, in MiB: little, so that it is searched fast.
const MEMORY_MIB: u64 = 256;

/// Bytes per read.
const CHUNK_BYTES: usize = 1 << 20;

/// Bytes of a page of the guest.
const PAGE: usize = pattern::PAGE_BYTES;

const SEED: u64 = 7;

/// The page that is corrupted.
const PAGE_NUMBER: u64 = 3;

/// The corruption: neither zeros nor a pattern.
const PLANTED: [u8; PAGE] = [0x5c; PAGE];

/// Between two scans of the guest's memory.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

#[test]
fn soak_names_a_corrupted_page() {
    let file = kept_file();
    println!("corrupting {file:?}");
    let directory = tempfile::tempdir().unwrap();
    let soak = Command::new(lab_program())
        .args(["soak", "--minutes", "2", "--driver", "own", "--backing", "4k"])
        .args(["--memory", &format!("{MEMORY_MIB}MiB"), "--seed", &SEED.to_string()])
        // For the logs of failures.
        .env("TMPDIR", directory.path())
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (planted, output) = plant(soak, &file);
    let (code, out, err) = outcome(&output);
    println!("{planted} copies were corrupted\n{out}{err}");
    assert_eq!(code, Some(1));
    let wrong = format!(
        "wrong pages in own-4k: 1 of {}: page {PAGE_NUMBER} holds 0x5c5c5c5c5c5c5c5c",
        file.name
    );
    assert!(err.contains(&wrong), "{wrong}");
    assert!(err.contains(&format!("--seed {SEED}")));
    let logs = out.lines().find_map(|line| line.strip_prefix("logs of own-4k: ")).unwrap();
    assert!(Path::new(logs).join("guest.log").exists(), "{logs}");
    let row = out.lines().find(|line| line.starts_with("| wrong pages")).unwrap();
    assert!(row.ends_with(" 1 |"), "{row}");
}

/// A file of the plan that is filled early and verified twice.
fn kept_file() -> PatternFile {
    let mut plan = plan_for(SEED, Driver::Own, HostPages::Small, MEMORY_MIB);
    let mut checks: BTreeMap<String, (PatternFile, u32)> = BTreeMap::new();
    for _ in 0..100 {
        match plan.next_step() {
            Step::Fill(file) | Step::Bounce { file: Some(file), .. } => {
                checks.insert(file.name.clone(), (file, 0));
            }
            Step::Drop(name) => drop(checks.remove(&name)),
            Step::Check => checks.values_mut().for_each(|(_, checks)| *checks += 1),
            _ => {}
        }
        if let Some((file, _)) = checks.values().find(|(_, checks)| *checks == 2) {
            return file.clone();
        }
    }
    panic!("seed {SEED} keeps no file for long; take another one");
}

/// Corrupts the page wherever it is, until the program ends: in the file, and in the buffer from
/// which it was written.
fn plant(mut soak: Child, file: &PatternFile) -> (u32, std::process::Output) {
    let mut wanted = [0; PAGE];
    pattern::generate(&mut wanted, file.seed, PAGE_NUMBER);
    let end = Instant::now() + LIMIT;
    let mut planted = 0;
    while soak.try_wait().unwrap().is_none() && Instant::now() < end {
        let memory = children(soak.id()).into_iter().find_map(guest_memory);
        let memory = memory.filter(|file| file.metadata().unwrap().len() >= MEMORY_MIB << 20);
        planted += memory.map_or(0, |memory| overwrite(&memory, &wanted));
        std::thread::sleep(POLL_INTERVAL);
    }
    // A program that never ends fails the test too.
    let _ = soak.kill();
    (planted, soak.wait_with_output().unwrap())
}

/// Overwrites each page that holds `wanted`. Returns their number.
fn overwrite(memory: &File, wanted: &[u8]) -> u32 {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut found = 0;
    for at in (0..memory.metadata().unwrap().len()).step_by(CHUNK_BYTES) {
        // The memory of an ended guest is gone.
        let read = memory.read_at(&mut chunk, at).unwrap();
        for (page, offset) in chunk[..read].chunks(PAGE).zip((at..).step_by(PAGE)) {
            if page == wanted {
                memory.write_all_at(&PLANTED, offset).unwrap();
                found += 1;
            }
        }
    }
    found
}

/// Child processes of a process.
fn children(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let listed =
        tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    listed
        .flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|pid| pid.parse().ok())
        .collect()
}
