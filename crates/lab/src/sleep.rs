//! Guests that sleep, which is how Linux suspends a driver and its device, and what wakes them.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::error::{Context, LabError, Result};
use crate::guest::Guest;

const STATE: &str = "/sys/power/state";
/// How often it has slept.
const SLEPT: &str = "/sys/power/suspend_stats/success";

/// Time to go to sleep and to wake, in emulation, on a machine with other work.
const LIMIT: Duration = Duration::from_secs(120);

/// Between two calls: one that comes before the guest sleeps is not heard.
const CALL_AGAIN: Duration = Duration::from_millis(200);

/// What wakes a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waker {
    /// SIGUSR1, in User Mode Linux (`arch/um`, `init_pm_wake_signal`).
    Signal,
    /// A key on the serial line of this name.
    SerialLine(&'static str),
}

impl Guest {
    /// Has the guest sleep and wakes it; it is awake when this returns.
    ///
    /// # Errors
    /// Its kernel's refusal, or its silence.
    pub fn sleep(&mut self, waker: Waker) -> Result<()> {
        let state = match waker {
            Waker::Signal => "mem",
            Waker::SerialLine(line) => {
                self.run(&format!("write /sys/class/tty/{line}/power/wakeup enabled"))?;
                "freeze"
            }
        };
        let before = self.slept()?;
        self.fall_asleep(state, waker)?;
        let after = self.slept()?;
        if after == before {
            let what = "a guest that slept".to_owned();
            return Err(LabError::Unexpected { what, detail: format!("{after} times before") });
        }
        Ok(())
    }

    fn slept(&mut self) -> Result<String> {
        Ok(self.run(&format!("cat {SLEPT}"))?.lines.join(""))
    }

    fn fall_asleep(&mut self, state: &str, waker: Waker) -> Result<()> {
        let command = format!("write {STATE} {state}");
        let number = self.ask(&command)?;
        let end = Instant::now() + LIMIT;
        loop {
            match self.answer(number, &command, CALL_AGAIN) {
                Err(LabError::Timeout { .. }) if Instant::now() < end => self.call(waker)?,
                answer => return answer.map(drop),
            }
        }
    }

    fn call(&mut self, waker: Waker) -> Result<()> {
        match waker {
            Waker::Signal => {
                let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
                let called = pid.map_or(Ok(()), |pid| kill_process(pid, Signal::USR1));
                called.context(|| "wake a guest".to_owned())
            }
            Waker::SerialLine(_) => self.press_return(),
        }
    }
}
