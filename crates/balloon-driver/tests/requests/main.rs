//! Requests with a model of a kernel and of a host. For any events between
//! two calls, every request is answered once and in order, every named block was
//! free, and no block is freed that the host relies on.

mod buddy;
mod guest;
mod host;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use balloon_abi::{Caches, Command, Outcome};
use balloon_driver::{Geometry, RequestHandler, hold_floor_pages};
use proptest::prelude::*;

use buddy::MAX_ORDER;
use guest::{ANSWER_BYTES, Event, Kernel, Queue, World, ZONES};

const ALL_FREE: Command = Command::ReportFree { min_granule_shift: 12 };

fn run(world: &Rc<RefCell<World>>) -> u64 {
    let geometry = Geometry { page_shift: 12, max_order: MAX_ORDER };
    let mut requests = RequestHandler::new(geometry);
    let mut queue = Queue { world: world.clone(), buffer: Box::new([0; ANSWER_BYTES]) };
    let mut ran = 0;
    loop {
        let now = requests.run(&mut Kernel(world.clone()), &mut queue);
        ran += now;
        let mut shared = world.borrow_mut();
        if shared.gone || (now == 0 && shared.events.is_empty()) {
            return ran;
        }
        if now == 0 {
            shared.return_one(true);
        }
    }
}

fn pages(blocks: &[(u64, u64)]) -> BTreeSet<u64> {
    blocks.iter().flat_map(|(start, pages)| *start..start + pages).collect()
}

fn total() -> u64 {
    ZONES.iter().map(|(start, end)| end - start).sum()
}

/// A guest with an allocated page in every second block of the largest order.
fn fragmented() -> Rc<RefCell<World>> {
    let world = World::new(Vec::new());
    {
        let mut world = world.borrow_mut();
        let taken: Vec<u64> = std::iter::from_fn(|| world.buddy.allocate(0)).collect();
        let hole = |page: &u64| page % 64 == 7;
        for page in taken.iter().filter(|page| !hole(page)) {
            world.buddy.free(*page, 0);
        }
        world.allocated = taken.into_iter().filter(hole).map(|page| (page, 0)).collect();
    }
    world
}

#[test]
fn an_idle_guest_reports_all_free_pages() {
    for world in [World::new(Vec::new()), fragmented()] {
        let id = world.borrow_mut().ask(ALL_FREE);
        assert_eq!(run(&world), 1);
        let world = world.borrow();
        assert_eq!(world.host.ended, [(id, Outcome::Done)]);
        assert_eq!(pages(&world.host.named[&id]), world.buddy.pages_from(0));
    }
}

#[test]
fn blocks_below_the_minimum_are_not_reported() {
    let world = fragmented();
    let id = world.borrow_mut().ask(Command::ReportFree { min_granule_shift: 15 });
    run(&world);
    let world = world.borrow();
    assert_eq!(pages(&world.host.named[&id]), world.buddy.pages_from(3));
    assert!(world.buddy.pages_from(3).len() < world.buddy.pages_from(0).len());
}

#[test]
fn a_split_block_is_reported_again_in_another_answer() {
    let mut named_twice = 0;
    // The page is allocated between any two slices.
    for quiet in 0..60 {
        let world = World::new(vec![Event::Quiet(quiet), Event::Allocate(0)]);
        let id = world.borrow_mut().ask(ALL_FREE);
        run(&world);
        let named = &world.borrow().host.named[&id];
        let sum: u64 = named.iter().map(|(_, pages)| pages).sum();
        named_twice += u32::from(sum > pages(named).len() as u64);
    }
    assert!(named_twice > 0, "the case did not occur");
}

#[test]
fn caches_are_dropped_separately() {
    let world = World::new(Vec::new());
    let ask = |caches| world.borrow_mut().ask(Command::DropCaches(caches));
    ask(Caches::SLAB);
    ask(Caches::ALL);
    run(&world);
    let host = &world.borrow().host;
    assert_eq!(host.ended, [(1, Outcome::Done), (2, Outcome::Done)]);
}

#[test]
fn a_cancel_applies_between_page_cache_and_slab() {
    // The first check after the page cache was dropped sees it.
    let world = World::new(vec![Event::Quiet(2), Event::Cancel(0)]);
    let id = world.borrow_mut().ask(Command::DropCaches(Caches::ALL));
    run(&world);
    let world = world.borrow();
    assert_eq!(world.host.ended, [(id, Outcome::Cancelled)]);
    assert_eq!((world.caches.page_cache, world.caches.slab), (5, 90));
}

#[test]
fn an_error_of_the_kernel_is_reported() {
    let world = World::new(Vec::new());
    world.borrow_mut().refuses_to_drop = true;
    let id = world.borrow_mut().ask(Command::DropCaches(Caches::ALL));
    run(&world);
    assert_eq!(world.borrow().host.ended, [(id, Outcome::Failed)]);
}

#[test]
fn a_hold_leaves_the_reserve_and_can_be_released() {
    for reserve_pages in [0, 1000] {
        let world = fragmented();
        let before = world.borrow().buddy.pages();
        let floor = hold_floor_pages(total(), 10).max(reserve_pages);
        let id = world.borrow_mut().ask(Command::HoldFree { reserve_pages });
        let second = world.borrow_mut().ask(Command::HoldFree { reserve_pages });
        run(&world);
        {
            let world = world.borrow();
            assert_eq!(world.host.ended, [(id, Outcome::Done), (second, Outcome::Busy)]);
            assert_eq!(world.buddy.pages(), floor);
            assert_eq!(world.hold.pages(), before - floor);
            assert_eq!(pages(&world.host.named[&id]).len() as u64, before - floor);
        }
        let wrong = world.borrow_mut().ask(Command::ReleaseHold { hold: second });
        let right = world.borrow_mut().ask(Command::ReleaseHold { hold: id });
        let again = world.borrow_mut().ask(Command::ReleaseHold { hold: id });
        run(&world);
        let world = world.borrow();
        assert_eq!(
            world.host.ended[2..],
            [(wrong, Outcome::BadArgument), (right, Outcome::Done), (again, Outcome::BadArgument)]
        );
        assert_eq!(world.buddy.pages(), before);
        assert_eq!(world.hold.pages(), 0);
    }
}

#[test]
fn a_lost_hold_is_freed_after_the_host_returned_the_answer() {
    let world = World::new(Vec::new());
    let id = world.borrow_mut().ask(Command::HoldFree { reserve_pages: 0 });
    run(&world);
    let mut world = world.borrow_mut();
    let held = world.hold.pages();
    assert!(held > 0);
    world.pressure();
    assert_eq!(world.hold.pages(), held, "the host has not returned the answer");
    assert_eq!(world.host.ended.last(), Some(&(id, Outcome::HoldLost)));
    world.return_one(true);
    assert_eq!((world.hold.pages(), world.buddy.pages()), (0, total()));
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        1 => prop::sample::select(&[Caches::PAGE_CACHE, Caches::SLAB, Caches::ALL][..])
            .prop_map(Command::DropCaches),
        3 => (12..19u32).prop_map(|min_granule_shift| Command::ReportFree { min_granule_shift }),
        3 => (0..4000u64).prop_map(|reserve_pages| Command::HoldFree { reserve_pages }),
        2 => (1..12u32).prop_map(|hold| Command::ReleaseHold { hold }),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..30u8).prop_map(Event::Quiet),
        4 => guest::orders().prop_map(Event::Allocate),
        4 => any::<usize>().prop_map(Event::Free),
        3 => command().prop_map(Event::Ask),
        2 => (0..3u32).prop_map(Event::Cancel),
        6 => Just(Event::Return(true)),
        1 => Just(Event::Return(false)),
        1 => Just(Event::Pressure),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn host_and_guest_agree_for_any_events(
        events in prop::collection::vec(event(), 1..120),
        breaks in prop::option::weighted(0.1, 1..100usize),
    ) {
        let mut events = events;
        if let Some(at) = breaks.filter(|at| *at < events.len()) {
            events[at] = Event::Break;
        }
        let world = World::new(events);
        run(&world);
        let mut world = world.borrow_mut();
        // `receive` checked that no request is answered twice. Check that none is missing,
        // and their order.
        let first_ends = |busy: bool| {
            let mut seen = BTreeSet::new();
            let ends = world.host.ended.iter().filter(|(_, o)| busy || *o != Outcome::Busy);
            ends.filter(|(id, _)| seen.insert(*id)).map(|(id, _)| *id).collect::<Vec<_>>()
        };
        prop_assert!(first_ends(false).is_sorted(), "{:?}", world.host.ended);
        if !world.gone {
            let ended: BTreeSet<u32> = first_ends(true).into_iter().collect();
            for id in world.host.requested.keys() {
                prop_assert!(
                    ended.contains(id) || world.host.refused.contains(id),
                    "{id} was not answered"
                );
            }
            // Return the answers in flight.
            while !world.host.in_flight.is_empty() {
                world.return_one(true);
            }
        }
        let used: u64 = world.allocated.iter().map(|(_, order)| 1 << order).sum();
        prop_assert_eq!(world.buddy.pages() + used + world.hold.pages(), total());
        let held: u64 = world.hold_blocks.iter().map(|(_, order)| 1 << order).sum();
        prop_assert_eq!(world.hold.pages(), held);
        // A cancelled release leaves a hold that the host does not rely on.
        let released = |(id, outcome): &(u32, Outcome)| {
            matches!(world.host.requested[id], Command::ReleaseHold { .. })
                && *outcome != Outcome::BadArgument
        };
        if !world.gone && held > 0 && !world.host.ended.iter().any(released) {
            prop_assert!(world.host.relies_on.is_some(), "a hold that the host does not rely on");
        }
    }
}
