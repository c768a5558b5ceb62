//! The messages of User Mode Linux, in its order (arch/um/drivers/virtio_uml.c).

use std::collections::BTreeSet;

use balloon_abi::Features;
use control::api::{Driver, ReleaseMode};
use vhost_device_balloon::End;

use crate::support::TEST_TIMEOUT;
use crate::support::driver::{BITMAP, CLASSIC, INFLATE, NO_TELL_HOST, Vm, Vmm, is_readable};
use crate::support::front_end::{CONFIG_CHANGE, channel_message};
use crate::support::guest::{BYTES, Guest, data_pages};
use crate::support::server::Server;
use crate::{assert_balloons, assert_serves, some_pages};

#[test]
fn inflates_and_deflates_in_every_format_and_mode() {
    for mode in [ReleaseMode::Background, ReleaseMode::Immediate, ReleaseMode::PerPage] {
        let server = Server::new(mode);
        for form in [CLASSIC, BITMAP, NO_TELL_HOST] {
            for ring in [Features::NONE, Features::RING_EVENT_IDX, Features::RING_INDIRECT_DESC] {
                assert_serves(&server, Vmm::Uml, form | ring);
            }
        }
        let faults = server.status().faults;
        assert_eq!(faults.total(), 0, "{faults:?}");
    }
}

#[test]
fn a_driver_is_removed_and_inserted_again() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    for features in [CLASSIC, BITMAP, CLASSIC | Features::RING_EVENT_IDX] {
        assert_balloons(&server, &mut vm);
        vm.remove_uml(true);
        vm.probe_uml(features, true);
        vm.front.barrier();
        let driver = server.status().guest.driver;
        let bitmap = features.contains(Features::PAGE_BITMAP);
        assert_eq!(driver, if bitmap { Driver::Aerostat } else { Driver::Classic });
    }
    assert_balloons(&server, &mut vm);
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_eq!(server.status().faults.total(), 0);
}

/// After a driver that clears an offered feature, `virtio_uml` negotiates without
/// bit 30 and then neither enables nor disables queues.
#[test]
fn a_second_negotiation_without_protocol_features_is_served() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    assert_balloons(&server, &mut vm);
    vm.remove_uml(true);
    for features in [CLASSIC, BITMAP, CLASSIC] {
        vm.probe_uml(features, false);
        assert_balloons(&server, &mut vm);
        vm.remove_uml(false);
    }
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_eq!(server.status().faults.total(), 0);
}

#[test]
fn a_change_of_the_target_is_sent_on_the_channel() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    vm.front.barrier();
    let channel = vm.channel.as_ref().unwrap();
    assert!(!is_readable(channel, std::time::Duration::ZERO), "there is no target yet");
    for pages in [5, 700, 0, 3] {
        server.balloon.set_target(pages).unwrap();
        assert_eq!(channel_message(channel), CONFIG_CHANGE);
        assert_eq!(vm.front.num_pages(), pages);
    }
    server.balloon.set_target(3).unwrap();
    vm.front.barrier();
    assert!(!is_readable(channel, std::time::Duration::ZERO), "the target is the same");
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
}

#[test]
fn a_target_set_before_the_guest_is_sent_when_it_connects() {
    let server = Server::new(ReleaseMode::Background);
    let generation = server.balloon.set_target(77).unwrap();
    for round in 0..2 {
        let (front, served) = server.connect();
        let mut vm = Vm::new(Vmm::Uml, front, Guest::new());
        vm.attach();
        assert_eq!(channel_message(vm.channel.as_ref().unwrap()), CONFIG_CHANGE);
        vm.probe(CLASSIC);
        assert_eq!(vm.front.num_pages(), 77, "in round {round}");
        let pages: BTreeSet<u64> = data_pages().take(77).collect();
        vm.inflate(&pages);
        vm.front.write_actual(77);
        assert!(server.balloon.wait_change(generation, TEST_TIMEOUT).at_target);
        vm.guest.assert_gone(&pages);
        drop(vm);
        assert_eq!(served.outcome().unwrap(), End::HungUp);
    }
}

#[test]
fn configuration_is_read_and_written_field_by_field() {
    let server = Server::new(ReleaseMode::Background);
    let (front, _served) = server.connect();
    let vm = Vm::boot(Vmm::Uml, front, CLASSIC);
    server.balloon.set_target(0x0102).unwrap();
    vm.front.write_actual(0x0304);
    let config = vm.front.read_config(16);
    assert_eq!(config, [2, 1, 0, 0, 4, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(vm.front.read_config(8), config[..8], "UML reads up to the field");
    assert!(vm.front.read_config(0).is_empty());
    assert_eq!(vm.front.read_config(256)[16..], [0; 240], "the rest is zero");
    assert_eq!(server.status().balloon.actual_pages, 0x0304);

    for (offset, data) in [(0, &[9, 9, 9, 9][..]), (8, &[9; 4]), (5, &[9; 4]), (4, &[9; 3])] {
        vm.front.write_config(offset, data);
    }
    assert_eq!(vm.front.read_config(16), config, "the device's fields do not change");
    assert_eq!(server.guest_faults("config_write"), 4);
}

/// A vring wraps around many times, with several messages per kick.
#[test]
fn a_vring_wraps_around() {
    let server = Server::new(ReleaseMode::Background);
    let (front, served) = server.connect();
    let mut vm = Vm::boot(Vmm::Uml, front, CLASSIC | Features::RING_EVENT_IDX);
    let message = vm.name_pages(&some_pages().into_iter().take(8).collect());
    for _ in 0..700 {
        vm.post(INFLATE, &message);
        vm.post(INFLATE, &message);
        vm.kick(INFLATE);
        vm.wait_used(INFLATE);
        vm.wait_used(INFLATE);
    }
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    assert_eq!(server.status().faults.total(), 0);
}

#[test]
fn the_status_describes_the_guest() {
    let server = Server::new(ReleaseMode::Background);
    assert!(!server.status().guest.connected);
    let (front, served) = server.connect();
    let vm = Vm::boot(Vmm::Uml, front, BITMAP);
    vm.front.barrier();
    let status = server.status();
    assert!(status.guest.connected);
    assert_eq!(status.guest.memory_bytes, BYTES);
    assert_eq!(status.balloon.max_bytes, Some(BYTES));
    assert_eq!(status.resident_bytes, Some(vm.guest.blocks() * 512));
    drop(vm);
    assert_eq!(served.outcome().unwrap(), End::HungUp);
    let status = server.status();
    assert!(!status.guest.connected);
    assert_eq!((status.guest.memory_bytes, status.resident_bytes), (0, None));
    assert_eq!(status.guest.driver, Driver::None);
}
