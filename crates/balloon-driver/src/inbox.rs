//! Requests that have arrived: what waits, what runs, and why it must stop.
//!
//! The host may send at any time, from a cancel to the next request, while the
//! one before is carried out. So arriving is apart from carrying out: the caller
//! guards an inbox by a lock of its own that it never holds for long.

use balloon_abi::request::{
    ANSWER_VALUES, AnswerHeader, Command, MAX_WAITING_REQUESTS, Outcome, Request, RequestError,
};

/// A request whose turn has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceivedRequest {
    /// What its answers carry.
    pub id: u32,
    /// What to do, or how to refuse.
    pub command: Result<Command, Outcome>,
}

/// Why the running request goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The host said so; it still gets one answer.
    Cancelled,
    /// The host did not accept an answer: it gets no other.
    Refused,
    /// The guest needs the memory of the hold, and that was the last answer.
    Lost,
    /// The device does not answer any more, or the driver leaves it.
    Gone,
}

/// What to do about a request that has just arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intake {
    /// Nothing: nobody can be answered, or nothing has that id.
    Ignore,
    /// It waits for its turn.
    Queued,
    /// The running request has to stop.
    StopRunning,
    /// Too many wait; this is the answer, to be sent at once.
    Refuse(AnswerHeader),
}

#[derive(Clone, Copy)]
struct Waiting {
    asked: ReceivedRequest,
    cancelled: bool,
}

/// The requests of one device.
pub struct Inbox {
    waiting: [Option<Waiting>; MAX_WAITING_REQUESTS],
    /// Id of the request that runs, 0 where none does.
    running: u32,
    stop: Option<Stop>,
}

impl Inbox {
    /// An empty one.
    pub const fn new() -> Self {
        Self { waiting: [None; MAX_WAITING_REQUESTS], running: 0, stop: None }
    }

    /// Takes what the host wrote, copied out of the buffer before.
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
                *slot = Some(Waiting { asked: ReceivedRequest { id, command }, cancelled: false });
                Intake::Queued
            }
            None => {
                let values = [0; ANSWER_VALUES];
                Intake::Refuse(AnswerHeader { id, outcome: Outcome::Busy, elapsed_ns: 0, values })
            }
        }
    }

    /// Ends the running request and begins with the one that waits longest.
    pub fn begin_next(&mut self) -> Option<ReceivedRequest> {
        let first = self.waiting[0].take();
        self.waiting.rotate_left(1);
        self.running = first.map_or(0, |first| first.asked.id);
        self.stop = first.filter(|first| first.cancelled).map(|_| Stop::Cancelled);
        first.map(|first| first.asked)
    }

    /// Why the running request must stop, where it must.
    pub const fn stopped(&self) -> Option<Stop> {
        self.stop
    }

    /// The host did not accept an answer to `id`. True when that request runs.
    pub fn refuse(&mut self, id: u32) -> bool {
        self.end(id, Stop::Refused)
    }

    /// The hold `id` is lost, and its last answer on its way. True when that
    /// request still runs.
    pub fn lose(&mut self, id: u32) -> bool {
        self.end(id, Stop::Lost)
    }

    fn cancel(&mut self, id: u32) -> Intake {
        for waiting in self.waiting.iter_mut().flatten() {
            waiting.cancelled |= waiting.asked.id == id;
        }
        if self.running != id {
            return Intake::Ignore;
        }
        self.stop = self.stop.or(Some(Stop::Cancelled));
        Intake::StopRunning
    }

    /// A request that may not be answered any more may not be answered
    /// *cancelled* either.
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
    fn a_cancel_overtakes() {
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
    fn what_may_not_be_answered_is_not_answered_as_cancelled() {
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
    fn what_has_no_meaning_waits_for_its_refusal() {
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
