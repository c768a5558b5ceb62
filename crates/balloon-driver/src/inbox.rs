//! Received requests: the waiting ones, the running one, and why it must stop.
//!
//! The host may send a request or a cancel while another request runs. So receiving is
//! separate from execution: the caller protects the inbox with a lock that it holds only
//! briefly.

use balloon_abi::request::{
    ANSWER_VALUES, AnswerHeader, Command, MAX_WAITING_REQUESTS, Outcome, Request, RequestError,
};

/// A request to execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceivedRequest {
    /// The id, which its answers repeat.
    pub id: u32,
    /// The command, or the outcome with which to refuse it.
    pub command: Result<Command, Outcome>,
}

/// Why the running request must stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The host cancelled it. It still needs its last answer.
    Cancelled,
    /// The host did not accept an answer. It gets no further answer.
    Refused,
    /// The guest needs the memory of the hold. `HoldLost` was the last answer.
    Lost,
    /// The device is broken or removed, or the driver is being removed.
    Gone,
}

/// What the caller must do after it received a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intake {
    /// Nothing: the request cannot be answered, or a cancel's id is not running.
    Ignore,
    /// The request was queued.
    Queued,
    /// The running request must stop.
    StopRunning,
    /// The queue is full. The caller must send this answer immediately.
    Refuse(AnswerHeader),
}

#[derive(Clone, Copy)]
struct Waiting {
    request: ReceivedRequest,
    cancelled: bool,
}

/// The requests of one device.
pub struct Inbox {
    waiting: [Option<Waiting>; MAX_WAITING_REQUESTS],
    /// Id of the running request, or 0.
    running: u32,
    stop: Option<Stop>,
}

impl Inbox {
    /// Creates an empty inbox.
    pub const fn new() -> Self {
        Self { waiting: [None; MAX_WAITING_REQUESTS], running: 0, stop: None }
    }

    /// Handles a request of the host, which the caller has copied out of the buffer.
    pub fn take(&mut self, bytes: &[u8]) -> Intake {
        let (id, command) = match Request::from_bytes(bytes) {
            Err(RequestError::NoRequest) => return Intake::Ignore,
            Ok(Request { id, command: Command::Cancel }) => return self.cancel(id),
            Ok(Request { id, command }) => (id, Ok(command)),
            Err(RequestError::UnknownCommand { id }) => (id, Err(Outcome::UnknownCommand)),
            Err(RequestError::BadArgument { id }) => (id, Err(Outcome::BadArgument)),
        };
        match self.waiting.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => {
                *slot =
                    Some(Waiting { request: ReceivedRequest { id, command }, cancelled: false });
                Intake::Queued
            }
            None => {
                let values = [0; ANSWER_VALUES];
                Intake::Refuse(AnswerHeader { id, outcome: Outcome::Busy, elapsed_ns: 0, values })
            }
        }
    }

    /// Ends the running request and starts the oldest waiting one.
    pub fn begin_next(&mut self) -> Option<ReceivedRequest> {
        let first = self.waiting[0].take();
        self.waiting.rotate_left(1);
        self.running = first.map_or(0, |first| first.request.id);
        self.stop = first.filter(|first| first.cancelled).map(|_| Stop::Cancelled);
        first.map(|first| first.request)
    }

    /// Returns why the running request must stop, if it must.
    pub const fn stopped(&self) -> Option<Stop> {
        self.stop
    }

    /// Records that the host did not accept an answer to `id`. Returns true if that request
    /// is running.
    pub fn refuse(&mut self, id: u32) -> bool {
        self.end(id, Stop::Refused)
    }

    /// Records that the hold `id` is lost and its last answer in flight. Returns true if
    /// that request is still running.
    pub fn lose(&mut self, id: u32) -> bool {
        self.end(id, Stop::Lost)
    }

    fn cancel(&mut self, id: u32) -> Intake {
        for waiting in self.waiting.iter_mut().flatten() {
            waiting.cancelled |= waiting.request.id == id;
        }
        if self.running != id {
            return Intake::Ignore;
        }
        self.stop = self.stop.or(Some(Stop::Cancelled));
        Intake::StopRunning
    }

    /// Sets the reason to stop. It replaces a cancel, since a request that may get no further
    /// answer may not be answered *cancelled* either.
    fn end(&mut self, id: u32, stop: Stop) -> bool {
        if self.running != id {
            return false;
        }
        if matches!(self.stop, None | Some(Stop::Cancelled)) {
            self.stop = Some(stop);
        }
        true
    }
}

impl Default for Inbox {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use balloon_abi::request::{Caches, REQUEST_BYTES};

    fn drop_caches(id: u32) -> [u8; REQUEST_BYTES] {
        Request { id, command: Command::DropCaches(Caches::ALL) }.to_bytes()
    }

    fn cancel(id: u32) -> [u8; REQUEST_BYTES] {
        Request { id, command: Command::Cancel }.to_bytes()
    }

    #[test]
    fn eight_wait_and_the_ninth_is_refused() {
        let mut inbox = Inbox::new();
        assert_eq!(inbox.take(&drop_caches(1)), Intake::Queued);
        assert_eq!(inbox.begin_next().unwrap().id, 1);
        for id in 2..10 {
            assert_eq!(inbox.take(&drop_caches(id)), Intake::Queued);
        }
        let Intake::Refuse(answer) = inbox.take(&drop_caches(10)) else { panic!("not refused") };
        assert_eq!((answer.id, answer.outcome), (10, Outcome::Busy));
        for id in 2..10 {
            assert_eq!(inbox.begin_next().unwrap().id, id);
        }
        assert_eq!(inbox.begin_next(), None);
        assert_eq!(inbox.take(&drop_caches(11)), Intake::Queued);
        assert_eq!(inbox.begin_next().unwrap().id, 11);
    }

    #[test]
    fn a_cancel_applies_before_waiting_requests_run() {
        let mut inbox = Inbox::new();
        assert_eq!(inbox.take(&cancel(1)), Intake::Ignore);
        for id in 1..4 {
            inbox.take(&drop_caches(id));
        }
        inbox.begin_next();
        assert_eq!(inbox.stopped(), None);
        assert_eq!(inbox.take(&cancel(3)), Intake::Ignore);
        assert_eq!(inbox.stopped(), None);
        assert_eq!(inbox.take(&cancel(1)), Intake::StopRunning);
        assert_eq!(inbox.stopped(), Some(Stop::Cancelled));
        assert_eq!((inbox.begin_next().unwrap().id, inbox.stopped()), (2, None));
        assert_eq!((inbox.begin_next().unwrap().id, inbox.stopped()), (3, Some(Stop::Cancelled)));
        assert_eq!((inbox.begin_next(), inbox.stopped()), (None, None));
    }

    #[test]
    fn a_refused_request_is_not_answered_as_cancelled() {
        let mut inbox = Inbox::new();
        inbox.take(&drop_caches(1));
        inbox.begin_next();
        assert!(!inbox.refuse(2));
        inbox.take(&cancel(1));
        assert!(inbox.refuse(1));
        assert_eq!(inbox.stopped(), Some(Stop::Refused));
        inbox.take(&cancel(1));
        assert!(inbox.lose(1));
        assert_eq!(inbox.stopped(), Some(Stop::Refused));
    }

    #[test]
    fn an_unknown_command_is_queued_with_its_refusal() {
        let mut inbox = Inbox::new();
        let mut bytes = drop_caches(5);
        bytes[4] = 77;
        assert_eq!(inbox.take(&bytes), Intake::Queued);
        assert_eq!(
            inbox.begin_next(),
            Some(ReceivedRequest { id: 5, command: Err(Outcome::UnknownCommand) })
        );
        assert_eq!(inbox.take(&bytes[..15]), Intake::Ignore);
        assert_eq!(inbox.take(&[0; REQUEST_BYTES]), Intake::Ignore);
    }
}
