//! Both message formats: the device's decoder against the naive parser, and the encoder against the
//! decoder.

use balloon_abi::record::{self, Records};
use balloon_device::{Fault, Faults, MemoryLayout, decode_bitmap, decode_pfn_array};
use guest_ring::naive::{self, Meaning, Reason};
use page_set::{PageRange, PageSet};

use crate::script::Script;

/// Regions of guest memory in balloon pages, small for the model.
const LAYOUTS: [&[(u64, u64)]; 4] = [
    &[(0, 0x1000)],
    &[(0x100, 0x700), (0xa00, 0x500)],
    &[(0, 1), (2, 1), (0x3fff0, 0x20), (0x7_ffff, 2)],
    &[],
];

/// Decodes a message of either format and compares.
///
/// # Panics
/// The two decoders disagree.
pub fn records(data: &[u8]) {
    let mut script = Script::new(data);
    let regions = script.pick(LAYOUTS);
    let layout = MemoryLayout::new(regions.iter().map(|(start, pages)| (start << 12, pages << 12)))
        .expect("the layouts are well-formed");
    let exists =
        |page: u64| regions.iter().any(|(start, pages)| (*start..start + pages).contains(&page));
    let classic = script.flag();
    let mut message = Vec::new();
    // Some generated records, then the remaining bytes.
    for _ in 0..script.u8() % 8 {
        message.extend(script.record(0x1100));
    }
    message.extend(script.bytes(usize::MAX));
    reencode(&message);
    if classic {
        let mut faults = Faults::default();
        let pages = decode_pfn_array(&message, &layout, &mut faults);
        let meaning = naive::page_numbers(&message, exists);
        assert_eq!(Meaning::Pages(each(&pages), faults.get(Fault::OutsideMemory)), meaning);
        return;
    }
    match (decode_bitmap(&message, &layout), naive::records(&message, exists)) {
        (Ok(pages), Meaning::Pages(model, _)) => {
            assert_eq!(each(&pages), model);
            assert_eq!(pages.len(), model.len() as u64);
        }
        (Err(fault), Meaning::Refused(reasons)) => {
            let reason = match fault {
                Fault::MalformedRecord => Reason::Malformed,
                Fault::OutsideMemory => Reason::Outside,
                Fault::RepeatedPage => Reason::Repeated,
                other => panic!("{other:?} is not a fault of records"),
            };
            assert!(reasons.contains(&reason), "{fault:?} is not one of {reasons:?}");
        }
        (device, model) => panic!("{device:?} against {model:?}"),
    }
}

fn each(pages: &PageSet) -> std::collections::BTreeSet<u64> {
    pages.ranges().flat_map(|range: PageRange| range.start()..range.end()).collect()
}

/// Encodes every decoded record to the same bytes.
fn reencode(message: &[u8]) {
    let mut rest = message;
    for record in Records::new(message).flatten() {
        let header = record.header();
        let words: Vec<u64> = if header.words == 0 { vec![] } else { record.words().collect() };
        let mut out = [0; 512];
        let len = record::encode(&mut out, header.start_pfn, header.granule_shift, &words)
            .expect("a decoded record can be encoded")
            .expect("a record has at most 512 bytes");
        let (was, behind) = rest.split_at(len);
        assert_eq!(out[..len], *was);
        rest = behind;
    }
}
