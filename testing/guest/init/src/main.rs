//! PID 1 of the test guests.
//!
//! Mounts file systems, reports that it is ready, and then answers commands on the console. See
//! [`console`] for the protocol and [`command`] for the commands.

#![forbid(unsafe_code)]

mod cache;
mod churn;
mod command;
mod console;
mod disk;
mod in_use;
mod kcore;
mod load;
mod memory;
mod module;
mod page_flags;
mod pattern;
mod pressure;
mod program;
mod system;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    // A second process allocates under pressure, which the kernel may kill.
    if arguments.get(1).map(String::as_str) == Some(pressure::CHILD_ARGUMENT) {
        return pressure::child(&arguments);
    }
    if arguments.get(1).map(String::as_str) == Some(churn::CHILD_ARGUMENT) {
        return churn::child(&arguments);
    }
    if arguments.get(1).map(String::as_str) == Some(program::CHILD_ARGUMENT) {
        return program::child(&arguments);
    }
    if arguments.get(1).map(String::as_str) == Some(load::CHILD_ARGUMENT) {
        return load::child(&arguments);
    }
    if let Err(error) = serve() {
        eprintln!("init: {error}");
    }
    // PID 1 must not return: the kernel would panic. Power off instead.
    system::power_off();
    ExitCode::FAILURE
}

/// Prepares the guest and answers commands until the host closes the console.
fn serve() -> Result<(), String> {
    system::mount_all()?;
    let mut console = console::Console::open()?;
    console.reply(0, &Ok("ready".to_owned()))?;
    while let Some(request) = console.next_request()? {
        let outcome = match request.words.split_first() {
            None => Err("empty command".to_owned()),
            Some((name, arguments)) => {
                command::run(name, arguments, &mut |line| console.line(request.id, line))
            }
        };
        console.reply(request.id, &outcome)?;
    }
    Ok(())
}
