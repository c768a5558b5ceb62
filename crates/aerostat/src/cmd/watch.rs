//! `aerostat status NAME --watch`: the same again and again, with fresh statistics.

use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use control::{Client, ControlError, Status};

use cli::failure::Failure;
use cli::output::print_more;

/// Shows the guest every `period`, until SIGINT or SIGTERM, or until nobody reads.
///
/// The guest is asked for statistics as often meanwhile, and as before afterwards.
pub(crate) fn run(
    client: &Client,
    period: Duration,
    show: impl Fn(&Status) -> Result<String, Failure>,
) -> Result<(), Failure> {
    let signals = |error: io::Error| Failure::new(&error, "check the limits of this user");
    let mut stop = stop_signal().map_err(signals)?;
    stop.set_read_timeout(Some(period)).map_err(signals)?;
    let asked = StatsPeriod::more_often(client, period)?;
    let mut first = true;
    loop {
        let text = show(&client.status()?)?;
        let gap = if std::mem::take(&mut first) { "" } else { "\n" };
        if !print_more(&format!("{gap}{text}"))? {
            break;
        }
        match stop.read(&mut [0]) {
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            _ => break,
        }
    }
    Ok(asked.as_before(client)?)
}

/// How often the guest was asked before, and is now.
struct StatsPeriod {
    before_ms: u64,
    now_ms: u64,
}

impl StatsPeriod {
    fn more_often(client: &Client, period: Duration) -> Result<Self, ControlError> {
        let before_ms = client.status()?.stats.interval_ms;
        let period_ms = u64::try_from(period.as_millis()).unwrap_or(u64::MAX);
        if (1..=period_ms).contains(&before_ms) {
            return Ok(Self { before_ms, now_ms: before_ms });
        }
        client.set_stats(period_ms)?;
        Ok(Self { before_ms, now_ms: period_ms })
    }

    /// Unless somebody else has changed it in between.
    fn as_before(&self, client: &Client) -> Result<(), ControlError> {
        if self.now_ms != self.before_ms && client.status()?.stats.interval_ms == self.now_ms {
            client.set_stats(self.before_ms)?;
        }
        Ok(())
    }
}

/// A stream that becomes readable on SIGINT or SIGTERM.
fn stop_signal() -> io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGINT, write.try_clone()?)?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGTERM, write)?;
    Ok(read)
}
