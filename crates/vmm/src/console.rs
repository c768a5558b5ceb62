//! Standard input and output, as the guest's serial line.

pub(crate) mod output;

use std::io::{self, IsTerminal, Read};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use diagnostics::{contain, panic_point};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::error::Error;
use crate::machine::Bus;

/// Bytes read at once.
const CHUNK_BYTES: usize = 256;

/// How long keys wait for a guest that takes none. As long as they do, the way out is not seen.
const KEY_TIME: Duration = Duration::from_secs(1);

/// A terminal's way out of the guest: Ctrl-A, then x, as other monitors have it.
const ESCAPE: u8 = 1;
const QUIT: u8 = b'x';

/// Puts the terminal back into its old mode at the end.
pub(crate) struct Console {
    before: Option<Termios>,
}

impl Console {
    /// Passes standard input on to the guest from now on. `quit` is called when somebody at a
    /// terminal asks for the end.
    pub(crate) fn start(bus: &Arc<Bus>, quit: impl Fn() + Send + 'static) -> Result<Self, Error> {
        let is_terminal = io::stdin().is_terminal();
        // Keys go to the guest as they are, Ctrl-C included, and the guest echoes them.
        let before = if is_terminal { tcgetattr(io::stdin()).ok() } else { None };
        let console = Self { before };
        if let Some(before) = &console.before {
            let mut raw = before.clone();
            raw.make_raw();
            // A terminal that cannot be raw still works, line by line.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, &raw);
        }
        let bus = Arc::clone(bus);
        // Not joined: it waits in a read that nothing ends but the end of the process.
        thread::Builder::new()
            .name("stdin".into())
            .spawn(move || {
                // A panic costs the keys that it was about.
                while contain(|| pass_on(&bus, is_terminal, &quit)).is_err() {}
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

fn pass_on(bus: &Bus, is_terminal: bool, quit: &impl Fn()) {
    let mut escape = Escape::default();
    let mut chunk = [0; CHUNK_BYTES];
    // A pipe waits for as long as the guest does, and nothing of it is lost.
    let patience = is_terminal.then_some(KEY_TIME);
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
            let (kept, quits) = escape.filter(&bytes);
            bytes = kept;
            if quits {
                return quit();
            }
        }
        if let Err(error) = bus.ports.type_in(&bytes, patience) {
            return tracing::warn!(%error, "host: the serial line takes no more input");
        }
    }
}

/// Finds the way out among the keys.
#[derive(Default)]
struct Escape {
    armed: bool,
}

impl Escape {
    /// What goes to the guest, and whether the way out was taken. The escape twice is the key
    /// itself.
    fn filter(&mut self, keys: &[u8]) -> (Vec<u8>, bool) {
        let mut kept = Vec::with_capacity(keys.len());
        for &key in keys {
            match (self.armed, key) {
                (false, ESCAPE) => self.armed = true,
                (true, QUIT) => return (kept, true),
                _ => {
                    self.armed = false;
                    kept.push(key);
                }
            }
        }
        (kept, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_out_is_found_across_reads_and_nothing_else_is_lost() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ls x\r"), (b"ls x\r".to_vec(), false));
        assert_eq!(escape.filter(b"\x01\x01x"), (b"\x01x".to_vec(), false));
        assert_eq!(escape.filter(b"a\x01"), (b"a".to_vec(), false));
        assert_eq!(escape.filter(b"xb"), (Vec::new(), true));
    }
}
