//! Runs a program of this machine where there is a real KVM, and prints what it printed:
//! `cargo run -p lab --example kvm -- MIB PROGRAM ARGUMENT...`, with MIB of memory for its guests.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use lab::kvm::KvmMachine;

const LIMIT: Duration = Duration::from_secs(600);

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let [mib, program, arguments @ ..] = words.as_slice() else {
        return Err("usage: kvm MIB PROGRAM ARGUMENT...".into());
    };
    let mib = mib.to_str().ok_or("no number")?.parse()?;
    let start = Instant::now();
    let mut machine = KvmMachine::boot(mib)?;
    eprintln!("booted after {:.1?}", start.elapsed());
    let arguments: Vec<&OsStr> = arguments.iter().map(OsString::as_os_str).collect();
    let outcome = machine.run(Path::new(program), &arguments, &[], LIMIT)?;
    for line in outcome.lines {
        println!("{line}");
    }
    eprintln!("{:?} after {:.1?}", outcome.code, start.elapsed());
    Ok(outcome
        .code
        .map_or(ExitCode::FAILURE, |code| ExitCode::from(u8::try_from(code).unwrap_or(1))))
}
