//! Whatever operator, driver and time do, each request ends once, and in turn.

use std::collections::BTreeMap;
use std::time::Instant;

use balloon_abi::{Command, Outcome, Vq};
use balloon_device::{Ask, MAX_OUTCOMES, MAX_QUEUED_REQUESTS};
use proptest::prelude::*;

use crate::guest::record_bytes;
use crate::requests::{ASKABLE, Back, DROP, HOLD, PostedRequest, SNAPSHOT, answer};

#[derive(Clone, Debug)]
enum Step {
    Submit { ask: Ask, seconds: u64 },
    Cancel { back: u32 },
    Wait,
    Answer { back: u32, outcome: u32, records: u8 },
    Serve,
    Time { seconds: u64 },
    Stop,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let ask = prop_oneof![Just(DROP), Just(SNAPSHOT), Just(HOLD), Just(Ask::ReleaseHold)];
    prop_oneof![
        6 => (ask, 0..20u64).prop_map(|(ask, seconds)| Step::Submit { ask, seconds }),
        1 => (0..4u32).prop_map(|back| Step::Cancel { back }),
        4 => Just(Step::Wait),
        // Mostly the newest request, mostly done.
        8 => (prop_oneof![5 => Just(0), 1 => 0..4u32, 1 => Just(1000)],
              prop_oneof![3 => Just(1), 2 => Just(0), 2 => 0..9u32], 0..6u8)
            .prop_map(|(back, outcome, records)| Step::Answer { back, outcome, records }),
        4 => Just(Step::Serve),
        2 => (0..5u64).prop_map(|seconds| Step::Time { seconds }),
        1 => Just(Step::Stop),
        1 => Just(Step::Reset),
    ]
}

/// What the model knows: ids in the order of submission, and which have ended.
#[derive(Default)]
struct Model {
    open: Vec<u32>,
    ended: BTreeMap<u32, &'static str>,
    last_sent: u32,
    newest: u32,
}

impl Model {
    /// Fetches outcomes: of open requests only, each once.
    fn collect(&mut self, asked: &mut PostedRequest) {
        let requests = asked.guest.balloon.requests_mut();
        self.open.retain(|id| match requests.take_outcome(*id) {
            Some(outcome) => {
                let name = outcome.as_ref().map_or_else(|failure| failure.name(), |_| "done");
                assert_eq!(self.ended.insert(*id, name), None, "{id} ended twice");
                assert!(!requests.is_open(*id));
                false
            }
            None => {
                assert!(requests.is_open(*id), "{id} is neither open nor ended");
                true
            }
        });
        assert!(self.ended.keys().all(|id| requests.take_outcome(*id).is_none()));
        assert_eq!(requests.next_deadline().is_some(), !self.open.is_empty());
        let total: u64 = requests.totals().iter().map(|(.., count)| count).sum();
        assert_eq!(total, self.ended.len() as u64);
        assert!(self.open.len() <= MAX_QUEUED_REQUESTS + 1 && self.open.len() < MAX_OUTCOMES);
    }

    fn submit(&mut self, asked: &mut PostedRequest, ask: Ask, deadline: Instant) {
        if let Ok(id) = asked.guest.balloon.requests_mut().submit(ask, deadline) {
            assert!(id > self.newest, "ids are new");
            self.newest = id;
            self.open.push(id);
        }
    }

    /// The queues stop.
    fn stop(&mut self, asked: &mut PostedRequest) {
        let PostedRequest { guest, queue, .. } = asked;
        guest.balloon.return_unused(Vq::Request, &guest.memory, &mut queue.queue).unwrap();
        guest.balloon.suspend();
        self.collect(asked);
        assert!(self.open.is_empty());
    }

    /// Another driver starts.
    fn reset(&mut self, asked: &mut PostedRequest) {
        asked.guest.balloon.reset(ASKABLE);
        asked.queue.set_up(&asked.guest.memory);
        self.collect(asked);
        assert!(self.open.is_empty());
    }

    /// What the driver sees on its queue.
    fn see(&mut self, asked: &mut PostedRequest) {
        while let Some(back) = asked.back() {
            let Back::PostedRequest(request) = back else { continue };
            if request.command == Command::Cancel {
                assert!(request.id <= self.last_sent, "only what was sent is told to stop");
                continue;
            }
            assert!(request.id > self.last_sent, "in order, and once");
            let earlier = self.open.iter().filter(|id| **id < request.id);
            let requests = asked.guest.balloon.requests();
            assert!(earlier.clone().all(|id| !requests.is_open(*id)), "one at a time");
            self.last_sent = request.id;
        }
    }
}

fn records(kind: u8) -> Vec<u8> {
    match kind {
        0 | 1 => Vec::new(),
        2 => record_bytes(0x400, 16, &[0b101]),
        3 => record_bytes(0x4000, 12, &[]),
        4 => [record_bytes(0x400, 12, &[]), record_bytes(0x400, 12, &[])].concat(),
        _ => vec![0xff; 9],
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn each_request_ends_once_and_in_turn(steps in prop::collection::vec(step(), 1..80)) {
        let mut asked = PostedRequest::new();
        let mut model = Model::default();
        let mut seconds = 0;
        let mut waiting = 0;
        for step in steps {
            match step {
                Step::Submit { ask, seconds: time } => {
                    let deadline = asked.at(seconds + time);
                    model.submit(&mut asked, ask, deadline);
                }
                Step::Cancel { back } => {
                    let id = model.newest.saturating_sub(back);
                    let deadline = asked.at(seconds + 1);
                    let open = asked.guest.balloon.requests().is_open(id);
                    let cancelled = asked.guest.balloon.requests_mut().cancel(id, deadline);
                    prop_assert_eq!(cancelled, open);
                }
                // The ring has 16 entries, and answers take two.
                Step::Wait if waiting < 6 => {
                    asked.post_waiting();
                    waiting += 1;
                    asked.serve();
                }
                Step::Wait => {}
                Step::Answer { back, outcome, records: kind } => {
                    let id = model.last_sent.saturating_sub(back);
                    let outcome_word = Outcome::from_wire(outcome).unwrap_or(Outcome::Done);
                    let mut message = answer(id, outcome_word, [3; 4], &records(kind));
                    message[4] = u8::try_from(outcome).unwrap();
                    asked.post_answer(&message);
                    asked.serve();
                }
                Step::Serve => asked.serve(),
                Step::Time { seconds: more } => {
                    seconds += more;
                    let now = asked.at(seconds);
                    asked.guest.balloon.requests_mut().expire(now);
                    asked.serve();
                }
                Step::Stop => model.stop(&mut asked),
                Step::Reset => {
                    model.reset(&mut asked);
                    waiting = 0;
                }
            }
            model.see(&mut asked);
            model.collect(&mut asked);
            // Chains that came back may wait again; a new ring is the simplest.
            if waiting == 6 && asked.guest.balloon.requests().running().is_none() {
                let PostedRequest { guest, queue, .. } = &mut asked;
                guest.balloon.forget_kept(Vq::Request);
                queue.set_up(&guest.memory);
                waiting = 0;
            }
        }
        model.reset(&mut asked);
        asked.guest.still_works();
    }
}
