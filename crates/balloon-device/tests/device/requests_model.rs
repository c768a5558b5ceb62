//! Each request ends once and in order, for any operator, driver and time.

use std::collections::BTreeMap;
use std::time::Instant;

use balloon_abi::{Command, Outcome, Vq};
use balloon_device::{DeviceRequest, MAX_OUTCOMES, MAX_QUEUED_REQUESTS};
use proptest::prelude::*;

use crate::guest::record_bytes;
use crate::requests::{DROP, Fixture, HOLD, Returned, SNAPSHOT, WITH_REQUESTS, answer};

#[derive(Clone, Debug)]
enum Step {
    Submit { ask: DeviceRequest, seconds: u64 },
    Cancel { back: u32 },
    Wait,
    Answer { back: u32, outcome: u32, records: u8 },
    Serve,
    Time { seconds: u64 },
    Stop,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let ask = prop_oneof![Just(DROP), Just(SNAPSHOT), Just(HOLD), Just(DeviceRequest::ReleaseHold)];
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

/// The model: ids in the order of submission, and which of them have ended.
#[derive(Default)]
struct Model {
    open: Vec<u32>,
    ended: BTreeMap<u32, &'static str>,
    last_sent: u32,
    newest: u32,
}

impl Model {
    /// Takes outcomes: of open requests only, each once.
    fn collect(&mut self, fixture: &mut Fixture) {
        let requests = fixture.guest.balloon.requests_mut();
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

    fn submit(&mut self, fixture: &mut Fixture, ask: DeviceRequest, deadline: Instant) {
        if let Ok(id) = fixture.guest.balloon.requests_mut().submit(ask, deadline) {
            assert!(id > self.newest, "ids are new");
            self.newest = id;
            self.open.push(id);
        }
    }

    /// Stops the queues.
    fn stop(&mut self, fixture: &mut Fixture) {
        let Fixture { guest, queue, .. } = fixture;
        guest.balloon.return_unused(Vq::Request, &guest.memory, &mut queue.queue).unwrap();
        guest.balloon.suspend();
        self.collect(fixture);
        assert!(self.open.is_empty());
    }

    /// Starts another driver.
    fn reset(&mut self, fixture: &mut Fixture) {
        fixture.guest.balloon.reset(WITH_REQUESTS);
        fixture.queue.set_up(&fixture.guest.memory);
        self.collect(fixture);
        assert!(self.open.is_empty());
    }

    /// Checks what the device returned on the queue.
    fn see(&mut self, fixture: &mut Fixture) {
        while let Some(back) = fixture.returned() {
            let Returned::Request(request) = back else { continue };
            if request.command == Command::Cancel {
                assert!(request.id <= self.last_sent, "only a request that was sent is cancelled");
                continue;
            }
            assert!(request.id > self.last_sent, "sent in order, and once");
            let earlier = self.open.iter().filter(|id| **id < request.id);
            let requests = fixture.guest.balloon.requests();
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
    fn each_request_ends_once_and_in_order(steps in prop::collection::vec(step(), 1..80)) {
        let mut fixture = Fixture::new();
        let mut model = Model::default();
        let mut seconds = 0;
        let mut waiting = 0;
        for step in steps {
            match step {
                Step::Submit { ask, seconds: time } => {
                    let deadline = fixture.at(seconds + time);
                    model.submit(&mut fixture, ask, deadline);
                }
                Step::Cancel { back } => {
                    let id = model.newest.saturating_sub(back);
                    let deadline = fixture.at(seconds + 1);
                    let open = fixture.guest.balloon.requests().is_open(id);
                    let cancelled = fixture.guest.balloon.requests_mut().cancel(id, deadline);
                    prop_assert_eq!(cancelled, open);
                }
                // The vring has 16 entries, and an answer takes two.
                Step::Wait if waiting < 6 => {
                    fixture.post_waiting();
                    waiting += 1;
                    fixture.serve();
                }
                Step::Wait => {}
                Step::Answer { back, outcome, records: kind } => {
                    let id = model.last_sent.saturating_sub(back);
                    let outcome_word = Outcome::from_wire(outcome).unwrap_or(Outcome::Done);
                    let mut message = answer(id, outcome_word, [3; 4], &records(kind));
                    message[4] = u8::try_from(outcome).unwrap();
                    fixture.post_answer(&message);
                    fixture.serve();
                }
                Step::Serve => fixture.serve(),
                Step::Time { seconds: more } => {
                    seconds += more;
                    let now = fixture.at(seconds);
                    fixture.guest.balloon.requests_mut().expire(now);
                    fixture.serve();
                }
                Step::Stop => model.stop(&mut fixture),
                Step::Reset => {
                    model.reset(&mut fixture);
                    waiting = 0;
                }
            }
            model.see(&mut fixture);
            model.collect(&mut fixture);
            // Returned chains could wait again; to set up a new vring is simpler.
            if waiting == 6 && fixture.guest.balloon.requests().running().is_none() {
                let Fixture { guest, queue, .. } = &mut fixture;
                guest.balloon.forget_pending(Vq::Request);
                queue.set_up(&guest.memory);
                waiting = 0;
            }
        }
        model.reset(&mut fixture);
        fixture.guest.still_works();
    }
}
