//! Commands of the host.

use std::fs;
use std::str::FromStr;

use crate::{
    cache, churn, disk, in_use, kcore, load, memory, module, page_flags, pressure, program, system,
};

/// Sends one line of an answer to the host.
pub(crate) type Emit<'a> = &'a mut dyn FnMut(&str) -> Result<(), String>;

/// Runs one command. The returned text is the last line of the answer.
pub(crate) fn run(name: &str, arguments: &[String], emit: Emit<'_>) -> Result<String, String> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match (name, words.as_slice()) {
        ("insmod", [path, parameters @ ..]) => module::insert(path, &parameters.join(" ")),
        ("rmmod", [module]) => module::remove(module),
        ("meminfo", []) => print_file("/proc/meminfo", emit),
        ("free-mib", []) => memory::free_mib(),
        ("touch", [mib]) => memory::touch(number(mib)?),
        ("fill", [file, mib, seed]) => memory::fill(file, number(mib)?, number(seed)?),
        ("verify", [file, mib, seed]) => memory::verify(file, number(mib)?, number(seed)?, emit),
        ("drop", [file]) => memory::drop_file(file),
        ("cat", [path]) => print_file(path, emit),
        ("ls", [path]) => list(path, emit),
        ("write", [path, text @ ..]) => write_file(path, &text.join(" ")),
        ("drop-caches", []) => system::drop_caches(),
        ("mount-host", [directory]) => cache::mount_host(directory),
        ("read-file", [path, mib]) => cache::read(path, number(mib)?),
        ("copy", [from, to, mib]) => disk::copy(from, to, number(mib)?),
        ("punch", [device, start, mib]) => disk::punch(device, number(start)?, number(mib)?),
        ("fill-device", [path, mib, seed]) => cache::fill(path, number(mib)?, number(seed)?),
        ("verify-device", [path, mib, seed]) => {
            cache::verify(path, number(mib)?, number(seed)?, emit)
        }
        ("not-free", ranges) => page_flags::not_free(ranges),
        ("offline", []) => page_flags::offline(),
        ("read-kcore", []) => kcore::read_all(),
        ("in-use", []) => in_use::count(),
        ("stall", [ms]) => load::meter(number(ms)?),
        ("busy", [mib]) => load::start(number(mib)?),
        ("idle", []) => load::stop(),
        ("churn", [mib, seed]) => churn::start(number(mib)?, number(seed)?),
        ("calm", []) => churn::stop(emit),
        ("pressure", [mib, hold_ms]) => pressure::run(number(mib)?, number(hold_ms)?),
        ("mount-root", [tag]) => program::mount_root(tag),
        ("program", words) => program::run(words, emit),
        ("sync", []) => {
            rustix::fs::sync();
            Ok(String::new())
        }
        ("poweroff", []) => {
            // An answer could be lost with the console, so the end of the guest is the answer.
            system::power_off();
            Err("the guest is still on".to_owned())
        }
        _ => Err(format!("no such command or wrong arguments: {name} {}", words.join(" "))),
    }
}

fn number<T: FromStr>(word: &str) -> Result<T, String> {
    word.parse().map_err(|_| format!("not a number: {word}"))
}

fn print_file(path: &str, emit: Emit<'_>) -> Result<String, String> {
    let text = fs::read(path).map_err(|error| format!("cannot read {path}: {error}"))?;
    for line in String::from_utf8_lossy(&text).lines() {
        emit(line)?;
    }
    Ok(String::new())
}

fn list(path: &str, emit: Emit<'_>) -> Result<String, String> {
    let failed = |error| format!("cannot list {path}: {error}");
    for entry in fs::read_dir(path).map_err(failed)? {
        emit(&entry.map_err(failed)?.file_name().to_string_lossy())?;
    }
    Ok(String::new())
}

fn write_file(path: &str, text: &str) -> Result<String, String> {
    fs::write(path, text).map_err(|error| format!("cannot write {path}: {error}"))?;
    Ok(String::new())
}
