//! The classic message: an array of little-endian `u32` page numbers
//! (virtio 1.3, section 5.5.6).

use crate::page::Pfn;

/// Bytes of one page number.
pub const PFN_BYTES: usize = 4;

/// Decodes the page numbers of a message.
///
/// Ignores an incomplete number at the end: the specification does not mention it, and QEMU
/// ignores it too.
pub fn decode(message: &[u8]) -> impl Iterator<Item = Pfn> {
    message
        .chunks_exact(PFN_BYTES)
        .map(|raw| Pfn(u64::from(u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]))))
}

/// Writes `pfn` as number `index` of a message. Returns false if the message is too short or
/// the page is above 16 TiB, so that its number does not fit in 32 bits.
pub fn encode(message: &mut [u8], index: usize, pfn: Pfn) -> bool {
    let Ok(raw) = u32::try_from(pfn.0) else { return false };
    let Some(slot) = index
        .checked_mul(PFN_BYTES)
        .and_then(|at| message.get_mut(at..)?.first_chunk_mut::<PFN_BYTES>())
    else {
        return false;
    };
    *slot = raw.to_le_bytes();
    true
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn decoding_inverts_encoding() {
        let mut message = [0; 12];
        assert!(encode(&mut message, 0, Pfn(1)));
        assert!(encode(&mut message, 1, Pfn(u64::from(u32::MAX))));
        assert!(!encode(&mut message, 2, Pfn(1 << 32)), "beyond 16 TiB");
        assert!(!encode(&mut message, 3, Pfn(1)), "beyond the message");
        assert!(!encode(&mut message, usize::MAX, Pfn(1)));
        let pfns: Vec<_> = decode(&message[..11]).collect();
        assert_eq!(pfns, [Pfn(1), Pfn(u64::from(u32::MAX))], "an incomplete number is ignored");
    }
}
