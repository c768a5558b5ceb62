//! Suspends and wakes guests. Linux suspends a driver and its device on the way.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::error::{Context, LabError, Result};
use crate::guest::Guest;

const STATE: &str = "/sys/power/state";
/// Number of suspends.
const SUSPEND_COUNT: &str = "/sys/power/suspend_stats/success";

/// Timeout to suspend and resume, in emulation, on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// Between two wake-ups: one before the suspend has no effect.
const WAKE_INTERVAL: Duration = Duration::from_millis(200);

/// How to wake a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waker {
    /// SIGUSR1, in User Mode Linux (`arch/um`, `init_pm_wake_signal`).
    Signal,
    /// A key on the serial line of this name.
    SerialLine(&'static str),
}

impl Guest {
    /// Suspends and wakes the guest. It is awake when this returns.
    ///
    /// # Errors
    /// The suspend fails or times out.
    pub fn sleep(&mut self, waker: Waker) -> Result<()> {
        let state = match waker {
            Waker::Signal => "mem",
            Waker::SerialLine(line) => {
                self.run(&format!("write /sys/class/tty/{line}/power/wakeup enabled"))?;
                "freeze"
            }
        };
        let before = self.suspend_count()?;
        self.suspend(state, waker)?;
        let after = self.suspend_count()?;
        if after == before {
            let what = "the guest's suspend count".to_owned();
            return Err(LabError::Unexpected { what, detail: format!("it is still {after}") });
        }
        Ok(())
    }

    fn suspend_count(&mut self) -> Result<String> {
        Ok(self.run(&format!("cat {SUSPEND_COUNT}"))?.lines.join(""))
    }

    fn suspend(&mut self, state: &str, waker: Waker) -> Result<()> {
        let command = format!("write {STATE} {state}");
        let number = self.send(&command)?;
        let end = Instant::now() + LIMIT;
        loop {
            match self.answer(number, &command, WAKE_INTERVAL) {
                Err(LabError::Timeout { .. }) if Instant::now() < end => self.wake(waker)?,
                answer => return answer.map(drop),
            }
        }
    }

    fn wake(&mut self, waker: Waker) -> Result<()> {
        match waker {
            Waker::Signal => {
                let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
                let sent = pid.map_or(Ok(()), |pid| kill_process(pid, Signal::USR1));
                sent.context(|| "wake a guest".to_owned())
            }
            Waker::SerialLine(_) => self.press_return(),
        }
    }
}
