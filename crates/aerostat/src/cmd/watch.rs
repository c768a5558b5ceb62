//! `aerostat status NAME --watch`: shows the status repeatedly, with fresh guest statistics.

use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use control::{Client, ControlError, Status};

use cli::failure::Failure;
use cli::output::print_more;

/// Shows the guest every `period`, until SIGINT, SIGTERM or a closed pipe.
///
/// Polls guest statistics at least as often, and restores the previous interval at the end.
pub(crate) fn run(
    client: &Client,
    period: Duration,
    show: impl Fn(&Status) -> Result<String, Failure>,
) -> Result<(), Failure> {
    let signals = |error: io::Error| Failure::new(&error, "check the limits of this user");
    let mut stop = stop_signal().map_err(signals)?;
    stop.set_read_timeout(Some(period)).map_err(signals)?;
    let interval = StatsInterval::shorten(client, period)?;
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
    Ok(interval.restore(client)?)
}

/// Polling intervals of guest statistics before and during the command.
struct StatsInterval {
    before_ms: u64,
    now_ms: u64,
}

impl StatsInterval {
    fn shorten(client: &Client, period: Duration) -> Result<Self, ControlError> {
        let before_ms = client.status()?.stats.interval_ms;
        let period_ms = u64::try_from(period.as_millis()).unwrap_or(u64::MAX);
        if (1..=period_ms).contains(&before_ms) {
            return Ok(Self { before_ms, now_ms: before_ms });
        }
        client.set_stats(period_ms)?;
        Ok(Self { before_ms, now_ms: period_ms })
    }

    /// Restores the interval, unless another client has changed it.
    fn restore(&self, client: &Client) -> Result<(), ControlError> {
        if self.now_ms != self.before_ms && client.status()?.stats.interval_ms == self.now_ms {
            client.set_stats(self.before_ms)?;
        }
        Ok(())
    }
}

/// Returns a stream that becomes readable on SIGINT or SIGTERM.
fn stop_signal() -> io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGINT, write.try_clone()?)?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGTERM, write)?;
    Ok(read)
}
