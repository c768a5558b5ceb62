//! Connects standard input and output to the guest's serial port.

use std::io::{self, IsTerminal, Read};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use diagnostics::{contain, panic_point};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::bus::Bus;
use crate::error::Error;

/// Bytes per read.
const CHUNK_BYTES: usize = 256;

/// How long keys wait for a guest that takes no input. Meanwhile the escape sequence is not
/// detected.
const KEY_TIMEOUT: Duration = Duration::from_secs(1);

/// The escape sequence that stops the guest: Ctrl-A, then x, as in QEMU.
const ESCAPE: u8 = 1;
const QUIT: u8 = b'x';

/// Restores the terminal's mode on drop.
pub(crate) struct Console {
    before: Option<Termios>,
}

impl Console {
    /// Starts forwarding standard input to the guest. Calls `quit` on the terminal's escape
    /// sequence.
    pub(crate) fn start(bus: &Arc<Bus>, quit: impl Fn() + Send + 'static) -> Result<Self, Error> {
        let is_terminal = io::stdin().is_terminal();
        // Keys go to the guest unchanged, Ctrl-C included, and the guest echoes them.
        let before = if is_terminal { tcgetattr(io::stdin()).ok() } else { None };
        let console = Self { before };
        if let Some(before) = &console.before {
            let mut raw = before.clone();
            raw.make_raw();
            // Without raw mode the terminal still works, line by line.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, &raw);
        }
        let bus = Arc::clone(bus);
        // Not joined: its read returns only at the end of the process.
        thread::Builder::new()
            .name("stdin".into())
            .spawn(move || {
                // After a panic only the current keys are lost.
                while contain(|| forward(&bus, is_terminal, &quit)).is_err() {}
            })
            .map_err(Error::host::<io::Error>("starting a thread"))?;
        Ok(console)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

fn forward(bus: &Bus, is_terminal: bool, quit: &impl Fn()) {
    let mut escape = Escape::default();
    let mut chunk = [0; CHUNK_BYTES];
    // A pipe waits without a timeout, so that no input is lost.
    let timeout = is_terminal.then_some(KEY_TIMEOUT);
    loop {
        let count = match io::stdin().read(&mut chunk) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return tracing::warn!(%error, "host: cannot read standard input"),
        };
        panic_point("stdin");
        let mut bytes = chunk[..count].to_vec();
        if is_terminal {
            let (forwarded, quits) = escape.filter(&bytes);
            bytes = forwarded;
            if quits {
                return quit();
            }
        }
        if let Err(error) = bus.ports.type_in(&bytes, timeout) {
            return tracing::warn!(%error, "host: the serial port takes no more input");
        }
    }
}

/// Detects the escape sequence.
#[derive(Default)]
struct Escape {
    armed: bool,
}

impl Escape {
    /// Returns the keys for the guest, and whether the escape sequence was completed. Ctrl-A twice
    /// sends Ctrl-A.
    fn filter(&mut self, keys: &[u8]) -> (Vec<u8>, bool) {
        let mut forwarded = Vec::with_capacity(keys.len());
        for &key in keys {
            match (self.armed, key) {
                (false, ESCAPE) => self.armed = true,
                (true, QUIT) => return (forwarded, true),
                _ => {
                    self.armed = false;
                    forwarded.push(key);
                }
            }
        }
        (forwarded, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_sequence_is_detected_across_reads_and_other_keys_pass() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ls x\r"), (b"ls x\r".to_vec(), false));
        assert_eq!(escape.filter(b"\x01\x01x"), (b"\x01x".to_vec(), false));
        assert_eq!(escape.filter(b"a\x01"), (b"a".to_vec(), false));
        assert_eq!(escape.filter(b"xb"), (Vec::new(), true));
    }
}
