//! Chains of any shape, in both forms of message.

use crate::guest::*;
use balloon_abi::{Features, Vq};
use balloon_device::Fault;
use guest_ring::{Buffer, INDIRECT, NEXT, WRITE, write_descriptor};
use virtio_queue::desc::split::Descriptor;

const FORMS: [Features; 2] = [BITMAP, CLASSIC];
/// Where indirect tables are written.
const TABLE: u64 = MIB + 0x40000;

/// A guest with a message that would inflate page 0x200, `len` bytes long.
fn guest_with_message(form: Features) -> (Guest, u32) {
    let guest = Guest::new(form);
    let message = guest.message([(0x200, 1)]);
    guest.write(MESSAGE, &message);
    (guest, u32::try_from(message.len()).unwrap())
}

/// Writes raw descriptors from slot 0, offers the first, and expects it back.
fn send_raw(guest: &mut Guest, descriptors: &[(u64, u32, u16, u16)]) -> u32 {
    for (i, &(addr, len, flags, next)) in (0u16..).zip(descriptors) {
        let descriptor = Descriptor::new(addr, len, flags, next);
        assert!(guest.inflate.ring.write_descriptor(&guest.memory, i, descriptor));
    }
    guest.inflate.ring.publish(&guest.memory, 0);
    guest.kick_for(Vq::Inflate, 0)
}

#[test]
fn chains_that_carry_no_message() {
    let chains: [(&str, &[Buffer]); 5] = [
        ("nothing", &[]),
        ("no bytes", &[Buffer::readable(MESSAGE, 0)]),
        ("no bytes, nowhere", &[Buffer::readable(u64::MAX, 0)]),
        ("only room", &[Buffer::writable(STATUS, 4)]),
        ("only room, 4 GiB of it", &[Buffer::writable(STATUS, u32::MAX)]),
    ];
    for form in FORMS {
        for (what, chain) in chains {
            println!("{what}");
            let (mut guest, _) = guest_with_message(form);
            guest.expects_fault(Fault::EmptyMessage, |guest| {
                guest.send_chain(Vq::Inflate, chain);
            });
        }
    }
}

#[test]
fn buffers_outside_of_memory() {
    for form in FORMS {
        for (addr, len) in [
            (NOWHERE, 8),
            (GAP.start * 4096 - 4, 8),
            (END_PAGE * 4096 - 4, 8),
            (END_PAGE * 4096, 8),
            (0, 8),
            (u64::MAX, 8),
            (u64::MAX - 3, 4),
            (u64::MAX & !7, 8),
            (1 << 63, 60_000),
        ] {
            println!("{len} bytes at {addr:#x}");
            let (mut guest, good) = guest_with_message(form);
            let chain = [Buffer::readable(MESSAGE, good), Buffer::readable(addr, len)];
            guest.expects_fault(Fault::BadDescriptor, |guest| {
                guest.send_chain(Vq::Inflate, &chain);
            });
        }
    }
}

#[test]
fn a_buffer_across_neighbouring_regions_is_read_whole() {
    for form in FORMS {
        let mut guest = Guest::new(form);
        let message = guest.message([(0x200, 1), (0x210, 1)]);
        let at = 4 * MIB - message.len() as u64 / 2;
        guest.write(at, &message);
        let len = u32::try_from(message.len()).unwrap();
        guest.send_chain(Vq::Inflate, &[Buffer::readable(at, len)]);
        assert_eq!(guest.held(), [(0x200, 1), (0x210, 1)]);
    }
}

#[test]
fn buffers_of_4_gib() {
    for form in FORMS {
        for chain in [
            vec![Buffer::readable(MESSAGE, u32::MAX)],
            vec![Buffer::readable(MESSAGE, 8), Buffer::readable(MESSAGE, u32::MAX - 8)],
            vec![Buffer::readable(NOWHERE, u32::MAX)],
            // Together more than 4 GiB, which no chain may be.
            vec![Buffer::readable(MESSAGE, u32::MAX); 3],
            vec![Buffer::readable(MESSAGE, 60_000), Buffer::readable(MESSAGE, 60_000)],
        ] {
            let (mut guest, _) = guest_with_message(form);
            guest.expects_fault(Fault::OversizedMessage, |guest| {
                guest.send_chain(Vq::Inflate, &chain);
            });
        }
    }
}

/// An indirect table with the honest message and room for a status.
fn write_table(guest: &Guest, len: u32) {
    assert!(write_descriptor(&guest.memory, TABLE, 0, Descriptor::new(MESSAGE, len, NEXT, 1)));
    assert!(write_descriptor(&guest.memory, TABLE, 1, Descriptor::new(STATUS, 4, WRITE, 0)));
}

#[test]
fn an_indirect_table_is_followed() {
    for form in FORMS {
        let (mut guest, len) = guest_with_message(form);
        write_table(&guest, len);
        let written = send_raw(&mut guest, &[(TABLE, 32, INDIRECT, 0)]);
        assert_eq!(written, if form == BITMAP { 4 } else { 0 });
        assert_eq!(guest.held(), [(0x200, 1)]);
        assert_eq!(guest.balloon.faults().total(), 0);
    }
}

#[test]
fn room_for_a_status_may_be_anywhere_or_nowhere() {
    let status_of = |chain: &[Buffer]| {
        let (mut guest, _) = guest_with_message(BITMAP);
        guest.write(STATUS, &NO_STATUS.to_le_bytes());
        let written = guest.send_chain(Vq::Inflate, chain);
        assert_eq!(guest.held(), [(0x200, 1)], "the message counts, whatever the room");
        guest.still_works();
        (written, guest.status())
    };
    let message = Buffer::readable(MESSAGE, 8);
    for (chain, written) in [
        (vec![message], 0),
        (vec![message, Buffer::writable(STATUS, 3)], 0),
        (vec![message, Buffer::writable(STATUS, 0)], 0),
        (vec![message, Buffer::writable(NOWHERE, 4)], 0),
        (vec![message, Buffer::writable(u64::MAX - 1, 4)], 0),
        (vec![message, Buffer::writable(END_PAGE * 4096 - 2, 4)], 0),
        (vec![message, Buffer::writable(END_PAGE * 4096 - 4, 4)], 4),
    ] {
        let (mut guest, _) = guest_with_message(BITMAP);
        assert_eq!(guest.send_chain(Vq::Inflate, &chain), written, "{chain:?}");
        assert_eq!(guest.held(), [(0x200, 1)], "the message counts, whatever the room");
        guest.still_works();
    }
    assert_eq!(status_of(&[message, Buffer::writable(STATUS, 4)]), (4, 0));
    assert_eq!(status_of(&[Buffer::writable(STATUS, 4), message]), (4, 0));
    assert_eq!(status_of(&[message, Buffer::writable(STATUS, 1 << 30)]), (4, 0));
    let split = [message, Buffer::writable(STATUS + 8, 3), Buffer::writable(STATUS, 4)];
    assert_eq!(status_of(&split), (4, 0));
}

#[test]
fn a_status_on_top_of_its_own_message_does_no_harm() {
    let (mut guest, _) = guest_with_message(BITMAP);
    let chain = [Buffer::readable(MESSAGE, 8), Buffer::writable(MESSAGE, 8)];
    assert_eq!(guest.send_chain(Vq::Inflate, &chain), 4);
    assert_eq!(guest.held(), [(0x200, 1)]);
}
