//! Chains of any shape, in both message formats.

use crate::guest::*;
use balloon_abi::{Features, Vq};
use balloon_device::Fault;
use guest_ring::{Buffer, INDIRECT, NEXT, WRITE, write_descriptor};
use virtio_queue::desc::split::Descriptor;

const FORMS: [Features; 2] = [BITMAP, CLASSIC];
/// Where indirect tables are written.
const TABLE: u64 = MIB + 0x40000;

/// Returns a guest with a message that inflates page 0x200, and the message's length.
fn guest_with_message(form: Features) -> (Guest, u32) {
    let guest = Guest::new(form);
    let message = guest.message([(0x200, 1)]);
    guest.write(MESSAGE, &message);
    (guest, u32::try_from(message.len()).unwrap())
}

/// Writes raw descriptors from slot 0, makes the first available, and expects it back.
fn send_raw(guest: &mut Guest, descriptors: &[(u64, u32, u16, u16)]) -> u32 {
    for (i, &(addr, len, flags, next)) in (0u16..).zip(descriptors) {
        let descriptor = Descriptor::new(addr, len, flags, next);
        assert!(guest.inflate.ring.write_descriptor(&guest.memory, i, descriptor));
    }
    guest.inflate.ring.publish(&guest.memory, 0);
    guest.kick_for(Vq::Inflate, 0)
}

#[test]
fn a_chain_without_readable_bytes_is_an_empty_message() {
    let chains: [(&str, &[Buffer]); 5] = [
        ("nothing", &[]),
        ("no bytes", &[Buffer::readable(MESSAGE, 0)]),
        ("no bytes, outside of memory", &[Buffer::readable(u64::MAX, 0)]),
        ("only writable", &[Buffer::writable(STATUS, 4)]),
        ("only writable, 4 GiB", &[Buffer::writable(STATUS, u32::MAX)]),
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
fn a_buffer_outside_of_memory_is_refused() {
    for form in FORMS {
        for (addr, len) in [
            (NOWHERE, 8),
            (GAP.start * 4096 - 4, 8),
            (END_PAGE * 4096 - 4, 8),
            (END_PAGE * 4096, 8),
            (0, 8),
            (u64::MAX, 8),
            (u64::MAX - 3, 4),
            (!7, 8),
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
fn a_buffer_across_adjacent_regions_is_read_completely() {
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
fn an_oversized_buffer_is_refused() {
    for form in FORMS {
        for chain in [
            vec![Buffer::readable(MESSAGE, u32::MAX)],
            vec![Buffer::readable(MESSAGE, 8), Buffer::readable(MESSAGE, u32::MAX - 8)],
            vec![Buffer::readable(NOWHERE, u32::MAX)],
            // More than 4 GiB in total, the maximum of a chain.
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

#[test]
fn a_chain_of_more_than_4_gib_is_refused_as_truncated() {
    for form in FORMS {
        let (mut guest, good) = guest_with_message(form);
        let filler = Buffer::writable(STATUS, u32::MAX - good);
        let chain = [Buffer::readable(MESSAGE, good), filler, Buffer::writable(STATUS, 8)];
        guest.expects_fault(Fault::BadDescriptor, |guest| {
            guest.send_chain(Vq::Inflate, &chain);
        });
    }
}

#[test]
fn an_endless_chain_is_refused() {
    let good = |form| if form == BITMAP { 8 } else { 4 };
    for form in FORMS {
        for (what, descriptors) in [
            ("a loop of one", vec![(MESSAGE, good(form), NEXT, 0)]),
            ("a loop of two", vec![(MESSAGE, good(form), NEXT, 1), (STATUS, 4, NEXT | WRITE, 0)]),
            ("next is one past the last slot", vec![(MESSAGE, good(form), NEXT, RING_SIZE)]),
            ("next is slot 65535", vec![(MESSAGE, good(form), NEXT, u16::MAX)]),
            ("a writable loop", vec![(MESSAGE, good(form), NEXT, 1), (STATUS, 0, NEXT | WRITE, 1)]),
        ] {
            println!("{what}");
            let (mut guest, _) = guest_with_message(form);
            guest.expects_fault(Fault::BadDescriptor, |guest| {
                send_raw(guest, &descriptors);
                // Free the broken slots for the driver.
                let memory = guest.memory.clone();
                guest.inflate.set_up(&memory);
            });
        }
    }
}

/// Writes an indirect table with the valid message and a status buffer.
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
fn an_invalid_indirect_table_is_refused() {
    for form in FORMS {
        for (what, table, len) in [
            ("no entry", TABLE, 0),
            ("half an entry", TABLE, 8),
            ("an entry and a half", TABLE, 24),
            ("outside of memory", NOWHERE, 32),
            ("at the end of the address space", !15, 32),
            ("4 GiB", TABLE, !15),
        ] {
            println!("{what}");
            let (mut guest, good) = guest_with_message(form);
            write_table(&guest, good);
            // The table comes first, so there is no message.
            guest.expects_fault(Fault::EmptyMessage, |guest| {
                send_raw(guest, &[(table, len, INDIRECT, 0)]);
            });
            // A complete message precedes the table, and still has no effect.
            guest.inflate.set_up(&guest.memory);
            guest.expects_fault(Fault::BadDescriptor, |guest| {
                send_raw(guest, &[(MESSAGE, good, NEXT, 1), (table, len, INDIRECT, 0)]);
                let memory = guest.memory.clone();
                guest.inflate.set_up(&memory);
            });
        }
    }
}

#[test]
fn an_indirect_table_within_a_table_is_refused() {
    for form in FORMS {
        let (mut guest, len) = guest_with_message(form);
        write_table(&guest, len);
        let outer = TABLE + 0x1000;
        let first = Descriptor::new(MESSAGE, len, NEXT, 1);
        assert!(write_descriptor(&guest.memory, outer, 0, first));
        let nested = Descriptor::new(TABLE, 32, INDIRECT, 0);
        assert!(write_descriptor(&guest.memory, outer, 1, nested));
        guest.expects_fault(Fault::BadDescriptor, |guest| {
            send_raw(guest, &[(outer, 32, INDIRECT, 0)]);
        });
    }
}

#[test]
fn an_endless_indirect_table_is_refused() {
    for form in FORMS {
        let (mut guest, len) = guest_with_message(form);
        for next in [0, 1, 2, u16::MAX] {
            let first = Descriptor::new(MESSAGE, len, NEXT, next);
            assert!(write_descriptor(&guest.memory, TABLE, 0, first));
            assert!(write_descriptor(&guest.memory, TABLE, 1, Descriptor::new(STATUS, 0, NEXT, 0)));
            guest.expects_fault(Fault::BadDescriptor, |guest| {
                send_raw(guest, &[(TABLE, 32, INDIRECT, 0)]);
                let memory = guest.memory.clone();
                guest.inflate.set_up(&memory);
            });
        }
    }
}

#[test]
fn the_status_buffer_may_be_anywhere_or_missing() {
    let status_of = |chain: &[Buffer]| {
        let (mut guest, _) = guest_with_message(BITMAP);
        guest.write(STATUS, &NO_STATUS.to_le_bytes());
        let written = guest.send_chain(Vq::Inflate, chain);
        assert_eq!(guest.held(), [(0x200, 1)], "the message counts with any status buffer");
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
        assert_eq!(guest.held(), [(0x200, 1)], "the message counts with any status buffer");
        guest.still_works();
    }
    assert_eq!(status_of(&[message, Buffer::writable(STATUS, 4)]), (4, 0));
    assert_eq!(status_of(&[Buffer::writable(STATUS, 4), message]), (4, 0));
    assert_eq!(status_of(&[message, Buffer::writable(STATUS, 1 << 30)]), (4, 0));
    let split = [message, Buffer::writable(STATUS + 8, 3), Buffer::writable(STATUS, 4)];
    assert_eq!(status_of(&split), (4, 0));
}

#[test]
fn a_status_may_overwrite_its_own_message() {
    let (mut guest, _) = guest_with_message(BITMAP);
    let chain = [Buffer::readable(MESSAGE, 8), Buffer::writable(MESSAGE, 8)];
    assert_eq!(guest.send_chain(Vq::Inflate, &chain), 4);
    assert_eq!(guest.held(), [(0x200, 1)]);
}

/// An indirect table can have more descriptors than a message may have.
#[test]
fn a_chain_of_65535_descriptors_is_refused() {
    let (mut guest, len) = guest_with_message(BITMAP);
    let table = 4 * MIB;
    for i in 0..u16::MAX {
        let (addr, len) = if i == 0 { (MESSAGE, len) } else { (u64::MAX, 0) };
        let flags = if i == u16::MAX - 1 { 0 } else { NEXT };
        assert!(write_descriptor(
            &guest.memory,
            table,
            i,
            Descriptor::new(addr, len, flags, i + 1)
        ));
    }
    guest.expects_fault(Fault::BadDescriptor, |guest| {
        send_raw(guest, &[(table, 16 * u32::from(u16::MAX), INDIRECT, 0)]);
    });
}
