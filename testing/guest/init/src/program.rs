//! Runs programs of the host, on its root file system.
//!
//! The host shares its root over 9p, read-only. Programs can write to `/run`, the only directory
//! there that belongs to the guest.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, Stdio};

use rustix::mount::{MountFlags, mount};
use rustix::process::{chdir, chroot};

use crate::command::Emit;

/// First argument of the process that becomes the program.
pub(crate) const CHILD_ARGUMENT: &str = "program-child";

/// Mount point of the host's root.
const ROOT: &str = "/host";

/// 9p version and message size. Larger messages need fewer exits.
const MOUNT_OPTIONS: &std::ffi::CStr = c"trans=virtio,version=9p2000.L,msize=524288,cache=loose";

/// Exit code of a program that cannot be started, as in shells.
const NOT_STARTED: u8 = 127;

/// Mounts the root that the host shares with `tag`, and the guest's kernel file systems in it.
pub(crate) fn mount_root(tag: &str) -> Result<String, String> {
    fs::create_dir_all(ROOT).map_err(|error| format!("cannot make {ROOT}: {error}"))?;
    let none = MountFlags::empty();
    let mounts = [
        (tag, "", "9p", MountFlags::RDONLY, Some(MOUNT_OPTIONS)),
        ("proc", "/proc", "proc", none, None),
        ("sysfs", "/sys", "sysfs", none, None),
        ("devtmpfs", "/dev", "devtmpfs", none, None),
        ("tmpfs", "/run", "tmpfs", none, None),
    ];
    for (source, place, kind, flags, data) in mounts {
        let target = format!("{ROOT}{place}");
        mount(source, &target, kind, flags, data)
            .map_err(|error| format!("cannot mount {target}: {error}"))?;
    }
    Ok(String::new())
}

/// Runs a program. Its output and errors are the answer's lines, and the last line is its end:
/// `exit=CODE` or `signal=NUMBER`. `NAME=VALUE` words before the program set its environment. `%XX`
/// in a word is an escaped byte.
pub(crate) fn run(words: &[&str], emit: Emit<'_>) -> Result<String, String> {
    let words = words.iter().map(|word| decode(word)).collect::<Result<Vec<_>, _>>()?;
    let program = words.iter().position(|word| !word.contains('=')).ok_or("no program")?;
    let (variables, words) = words.split_at(program);
    // One pipe for both streams, so that lines keep their order.
    let (read, write) = std::io::pipe().map_err(|error| error.to_string())?;
    let errors = write.try_clone().map_err(|error| error.to_string())?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(CHILD_ARGUMENT).args(words).env_clear();
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("TMPDIR", "/run");
    command.envs(variables.iter().filter_map(|word| word.split_once('=')));
    command.stdin(Stdio::null()).stdout(write).stderr(errors);
    let child = command.spawn();
    // The command holds the pipe's write end, which would keep it open.
    drop(command);
    let mut child = child.map_err(|error| format!("cannot start a process: {error}"))?;
    let mut lines = BufReader::new(read);
    let mut line = Vec::new();
    while matches!(lines.read_until(b'\n', &mut line), Ok(1..)) {
        emit(String::from_utf8_lossy(&line).trim_end())?;
        line.clear();
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(format!("exit={code}")),
        (None, signal) => Ok(format!("signal={}", signal.unwrap_or_default())),
    }
}

/// The process that becomes the program.
pub(crate) fn child(arguments: &[String]) -> ExitCode {
    let error = match arguments.get(2..) {
        Some([program, words @ ..]) => become_program(program, words),
        _ => "no program".to_owned(),
    };
    eprintln!("init: {error}");
    ExitCode::from(NOT_STARTED)
}

/// Replaces this process with the program. Returns only on an error.
fn become_program(program: &str, words: &[String]) -> String {
    if let Err(error) = chroot(ROOT).and_then(|()| chdir("/")) {
        return format!("cannot enter {ROOT}: {error}");
    }
    let error = Command::new(program).args(words).exec();
    format!("cannot start {program}: {error}")
}

fn decode(word: &str) -> Result<String, String> {
    let wrong = || format!("not a word: {word}");
    let mut bytes = Vec::new();
    let mut rest = word.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let byte;
        (byte, rest) = match (first, after) {
            (b'%', [high, low, after @ ..]) => {
                let digit = |digit: u8| char::from(digit).to_digit(16).ok_or_else(wrong);
                let code = digit(*high)? * 16 + digit(*low)?;
                (u8::try_from(code).map_err(|_| wrong())?, after)
            }
            (b'%', _) => return Err(wrong()),
            _ => (first, after),
        };
        bytes.push(byte);
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_decoded_or_rejected() {
        assert_eq!(decode("a%20b%25").unwrap(), "a b%");
        assert_eq!(decode("").unwrap(), "");
        for wrong in ["%", "%2", "%zz", "%ff"] {
            assert!(decode(wrong).is_err(), "{wrong}");
        }
    }
}
