//! Entry points for the host's requests. The balloon mutex protects none of this; each
//! entry point names its lock.

use core::ffi::{CStr, c_char, c_int};

use balloon_abi::request::{ANSWER_HEADER_BYTES, AnswerHeader, REQUEST_BYTES};
use balloon_abi::{Features, MessageStatus, QueueLayout, Vq};
use balloon_driver::{Geometry, Hold, Inbox, Intake, ReceivedRequest, RequestHandler};

use crate::entry::refusal;
use crate::kernel::Shim;
use crate::request_kernel::{request_traits, stop_number};

const IGNORE: c_int = 0;
const QUEUED: c_int = 1;
const STOP_RUNNING: c_int = 2;
const REFUSE: c_int = 3;

/// Returns the bytes of a [`RequestHandler`]. Accesses no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_requests_bytes() -> usize {
    size_of::<RequestHandler>()
}

/// Returns the bytes of an [`Inbox`]. Accesses no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_inbox_bytes() -> usize {
    size_of::<Inbox>()
}

/// Returns the bytes of a [`Hold`]. Accesses no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_hold_bytes() -> usize {
    size_of::<Hold>()
}

/// Returns the index of the request queue, or -1 if there is none. Accesses no state.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_request_vq(negotiated: u64) -> c_int {
    let index = QueueLayout::new(Features(negotiated)).index(Vq::Request);
    index.and_then(|index| c_int::try_from(index).ok()).unwrap_or(-1)
}

/// Initializes `core`.
///
/// # Safety
///
/// `core` must point to [`aerostat_requests_bytes`] writable bytes, aligned to 8,
/// that nothing else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_requests_init(
    core: *mut RequestHandler,
    page_shift: u32,
    max_order: u32,
) {
    // SAFETY: `core` is writable per this function's contract. The old value needs no
    // drop: a `RequestHandler` owns nothing.
    unsafe { core.write(RequestHandler::new(Geometry { page_shift, max_order })) }
}

/// Executes all waiting requests. Returns their number.
///
/// # Safety
///
/// `core` must be from [`aerostat_requests_init`] and not used by another call;
/// `shim` must be its device, which has requests.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_requests_run(core: *mut RequestHandler, shim: *mut Shim) -> u64 {
    // SAFETY: valid and exclusive per this function's contract.
    let core = unsafe { &mut *core };
    // SAFETY: the same.
    let (mut kernel, mut queue) = unsafe { request_traits(shim) };
    core.run(&mut kernel, &mut queue)
}

/// Initializes `inbox` as empty.
///
/// # Safety
///
/// `inbox` must point to [`aerostat_inbox_bytes`] writable bytes, aligned to 8,
/// that nothing else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_inbox_init(inbox: *mut Inbox) {
    // SAFETY: `inbox` is writable per this function's contract, and owns nothing.
    unsafe { inbox.write(Inbox::new()) }
}

/// Handles a request. Returns 0 to ignore it, 1 if it was queued, 2 if the running one
/// must stop, 3 if `answer` must be sent immediately.
///
/// # Safety
///
/// `inbox` must be from [`aerostat_inbox_init`], with the queue lock held.
/// `request` must point to 16 readable bytes, `answer` to 48 writable ones.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_inbox_take(
    inbox: *mut Inbox,
    request: *const [u8; REQUEST_BYTES],
    answer: *mut [u8; ANSWER_HEADER_BYTES],
) -> c_int {
    // SAFETY: valid and exclusive per this function's contract.
    let inbox = unsafe { &mut *inbox };
    // SAFETY: readable per this function's contract. A copy in the shim's memory, so
    // there are no concurrent writes.
    let request = unsafe { &*request };
    match inbox.take(request) {
        Intake::Ignore => IGNORE,
        Intake::Queued => QUEUED,
        Intake::StopRunning => STOP_RUNNING,
        Intake::Refuse(header) => {
            // SAFETY: writable per this function's contract.
            unsafe { write_answer(answer, header) }
            REFUSE
        }
    }
}

/// Ends the running request and starts the next one, written to `next_request`.
/// Returns false if there is none.
///
/// # Safety
///
/// `inbox` must be from [`aerostat_inbox_init`], with the queue lock held.
/// `next_request` must be the pointer that this crate passed to the shim.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_inbox_begin_next(
    inbox: *mut Inbox,
    next_request: *mut Option<ReceivedRequest>,
) -> bool {
    // SAFETY: valid and exclusive per this function's contract.
    let next = unsafe { &mut *inbox }.begin_next();
    // SAFETY: the shim passes on a live local of `KernelQueue::begin_next`.
    unsafe { next_request.write(next) }
    next.is_some()
}

/// Returns why the running request must stop, or 0.
///
/// # Safety
///
/// `inbox` must be from [`aerostat_inbox_init`], with the queue lock held.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_inbox_stopped(inbox: *const Inbox) -> c_int {
    // SAFETY: valid per this function's contract, and the held lock excludes writers.
    unsafe { &*inbox }.stopped().map_or(0, stop_number)
}

/// Handles the status of an answer to `id`, in native byte order. Returns why it was
/// refused, or null if it was accepted or its request had ended, which is no fault.
///
/// # Safety
///
/// `inbox` must be from [`aerostat_inbox_init`], with the queue lock held.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_inbox_answered(
    inbox: *mut Inbox,
    id: u32,
    status: u32,
) -> *const c_char {
    let status = MessageStatus::from_bytes(status.to_le_bytes());
    if status != Some(MessageStatus::Accepted) {
        // SAFETY: valid and exclusive per this function's contract.
        unsafe { &mut *inbox }.refuse(id);
    }
    let why = if status == Some(MessageStatus::Unwanted) { None } else { refusal(status) };
    why.map_or(core::ptr::null(), CStr::as_ptr)
}

/// Records that the hold `id` is lost. The caller puts the answer on the queue before it
/// releases the lock.
///
/// # Safety
///
/// `inbox` must be from [`aerostat_inbox_init`], with the queue lock held.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_inbox_lose(inbox: *mut Inbox, id: u32) {
    // SAFETY: valid and exclusive per this function's contract.
    unsafe { &mut *inbox }.lose(id);
}

/// Initializes `hold` as empty.
///
/// # Safety
///
/// `hold` must point to [`aerostat_hold_bytes`] writable bytes, aligned to 8,
/// that nothing else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_hold_init(hold: *mut Hold) {
    // SAFETY: `hold` is writable per this function's contract, and owns nothing.
    unsafe { hold.write(Hold::new()) }
}

/// Returns the balloon pages in the hold.
///
/// # Safety
///
/// `hold` must be from [`aerostat_hold_init`], with its mutex held.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_hold_pages(hold: *const Hold) -> u64 {
    // SAFETY: valid per this function's contract, and the held mutex excludes writers.
    unsafe { &*hold }.pages()
}

/// Gives the hold up because the guest needs the memory. Returns the hold's id, with the
/// `answer` to send, or 0 if there is nothing to give up.
///
/// # Safety
///
/// `hold` must be from [`aerostat_hold_init`], with its mutex held; `answer`
/// must point to 48 writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_hold_lose(
    hold: *mut Hold,
    now_ns: u64,
    answer: *mut [u8; ANSWER_HEADER_BYTES],
) -> u32 {
    // SAFETY: valid and exclusive per this function's contract.
    let Some(header) = unsafe { &mut *hold }.lose(now_ns) else { return 0 };
    // SAFETY: writable per this function's contract.
    unsafe { write_answer(answer, header) }
    header.id
}

/// Returns true while "hold lost" is in flight.
///
/// # Safety
///
/// `hold` must be from [`aerostat_hold_init`], with its mutex held.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_hold_is_losing(hold: *const Hold) -> bool {
    // SAFETY: valid per this function's contract, and the held mutex excludes writers.
    unsafe { &*hold }.is_losing()
}

/// Records that all blocks were freed. Returns their balloon pages.
///
/// # Safety
///
/// `hold` must be from [`aerostat_hold_init`], with its mutex held.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_hold_emptied(hold: *mut Hold) -> u64 {
    // SAFETY: valid and exclusive per this function's contract.
    unsafe { &mut *hold }.emptied()
}

/// # Safety
///
/// `answer` must be writable.
unsafe fn write_answer(answer: *mut [u8; ANSWER_HEADER_BYTES], header: AnswerHeader) {
    // SAFETY: writable per this function's contract.
    unsafe { answer.write(header.to_bytes()) }
}
