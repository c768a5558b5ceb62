//! Every request at every stage, with invalid payloads and files.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use balloon_abi::Features;
use control::api::ReleaseMode;

use super::hostile::{Stage, outcome_of};
use crate::assert_serves;
use crate::support::driver::{BITMAP, CLASSIC, Vmm};
use crate::support::front_end::{FLAGS, eventfd, message};
use crate::support::server::Server;

/// More than all requests of the protocol.
const REQUESTS: std::ops::Range<u32> = 0..46;

/// Payloads of the sizes that requests have, and of others.
fn payloads() -> Vec<Vec<u8>> {
    let mut payloads: Vec<Vec<u8>> =
        [0, 4, 8, 12, 40, 4096].into_iter().map(|len| vec![0; len]).collect();
    // Queue 1, or one empty region.
    payloads.push([[1u32, 0].map(u32::to_ne_bytes).concat(), vec![0; 32]].concat());
    payloads.push(vec![0xff; 40]);
    payloads
}

fn sweep(stages: &[Stage]) {
    let server = Server::new(ReleaseMode::Background);
    let file: OwnedFd = eventfd();
    for &stage in stages {
        for request in REQUESTS {
            for payload in payloads() {
                for count in [0, 1] {
                    let fds: Vec<BorrowedFd<'_>> = vec![file.as_fd(); count];
                    let bytes = message(request, FLAGS, &payload);
                    // Twice, followed by a valid request. For any outcome,
                    // `outcome_of` checks that no fault is attributed to the host.
                    let _ = outcome_of(&server, stage, |vm| {
                        for _ in 0..2 {
                            if vm.front.send_raw(&bytes, &fds).is_err() {
                                return;
                            }
                        }
                        vm.kick(0);
                        vm.kick(1);
                        vm.front.try_send(1, &[], &[]);
                    });
                }
            }
            let features: [Features; 2] = [CLASSIC, BITMAP];
            assert_serves(&server, Vmm::Uml, features[request as usize % 2]);
        }
    }
    let faults = server.status().faults;
    assert!(faults.front_end["protocol_violation"] > 500, "{faults:?}");
    // Only a forwarded config write may count as the guest's fault.
    let guest: Vec<&String> = faults.guest.keys().collect();
    assert_eq!(guest, ["config_write"], "{faults:?}");
}

#[test]
fn misused_requests_before_memory() {
    sweep(&[Stage::Fresh, Stage::Attached, Stage::Negotiated]);
}

#[test]
fn misused_requests_with_memory() {
    sweep(&[Stage::Memory, Stage::Placed]);
}

#[test]
fn misused_requests_with_queues() {
    sweep(&[Stage::Running, Stage::Stopped]);
}
