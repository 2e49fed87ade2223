// Messages from the blocks of a cluster to each other's shared memory, and the arrival barriers that count their bytes.
//
// A piece may arrive at any time after it was sent: the scheduler chooses when. For the checks, it is being written
// during this whole time, in which nobody may access its destination. Earlier accesses must have happened before the
// sending, and later ones after a wait for the end of the phase in which the barrier counted the piece.
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace emulator {
namespace {

struct Piece {
  Block* to;
  ptrdiff_t place;  // in shared memory
  uint4 value;
  ArrivalBarrier* barrier;
  Moment sent;
  SourceLine sent_at;
  size_t phase;  // in which it arrived; kOnItsWay before that
};
constexpr size_t kOnItsWay = ~size_t(0);
constexpr unsigned kNumberBits = 17;

std::vector<Piece> pieces;         // of the blocks that are running, by number
std::vector<size_t> on_their_way;  // their numbers

Moment arrival_of(size_t number) { return {kSent, 0, 0, number % (1u << kNumberBits), number >> kNumberBits}; }
const Piece& piece_of(Moment arrival) { return pieces[arrival.warp_syncs << kNumberBits | arrival.barriers]; }

ArrivalBarrier& barrier_in(Block& block, const void* p, SourceLine caller) {
  const auto found = block.arrivals.find(place_in_shared_memory(p));
  if (found == block.arrivals.end()) {
    complain("ARRIVAL BARRIER", "used before it is initialised, at " + place(caller));
    stop();
  }
  if (!happened_before_now(found->second.started))
    complain("DATA RACE", "the initialisation of an arrival barrier conflicts with its use at " + place(caller));
  return found->second;
}

// Has the running thread waited for the phase's end, or is it ordered after another thread's wait?
bool is_known_to_have_ended(const ArrivalBarrier::Phase& phase) {
  return std::any_of(phase.waits.begin(), phase.waits.end(),
                     [](Moment wait) { return wait.block != 0 && happened_before_now(wait); });
}

void try_end_of_phase(Block& block, ArrivalBarrier& barrier) {
  if (!barrier.expects || barrier.bytes_to_come != 0) return;
  barrier.expects = false;
  barrier.phases.emplace_back();
  for (Thread& t : block.threads)
    if (t.state == State::kAtArrivals) wake(t);
}

}  // namespace

bool piece_came_before_now(Moment m) {
  const Piece& piece = piece_of(m);
  return piece.phase != kOnItsWay && is_known_to_have_ended(piece.barrier->phases[piece.phase]);
}

std::string describe_piece(Moment m) {
  const Moment sent = piece_of(m).sent;
  return "block " + std::to_string(sent.block - 1) + " thread " + std::to_string(sent.thread) + " (sent)";
}

void forget_pieces() {
  pieces.clear();
  on_their_way.clear();
}

bool pieces_on_their_way() { return !on_their_way.empty(); }

void let_a_piece_arrive() {
  std::swap(on_their_way[random_bits() % on_their_way.size()], on_their_way.back());
  Piece& piece = pieces[on_their_way.back()];
  on_their_way.pop_back();
  std::memcpy(shared_memory_now(*piece.to) + piece.place, &piece.value, sizeof piece.value);
  ArrivalBarrier& barrier = *piece.barrier;
  piece.phase = barrier.phases.size() - 1;
  learn(barrier.phases.back().senders, piece.sent.block - 1, piece.sent.barriers);
  barrier.bytes_to_come -= sizeof piece.value;
  try_end_of_phase(*piece.to, barrier);
}

// A block that has waited for a piece cannot have ended before the piece arrived.
void check_end_of_cluster() {
  for (const Piece& piece : pieces)
    if (piece.barrier->phases[piece.phase].waits.empty())
      complain("BLOCK MAY HAVE ENDED",
               "it has not waited for the message that is sent to it at " + place(piece.sent_at));
}

extern "C" void emulator_start_arrivals(const void* p, SourceLine caller) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(uint64_t) != 0)
    complain("MISALIGNED", "arrival barrier, at " + place(caller));
  const ArrivalBarrier fresh = {now(Access::kWrite), 0, false, std::vector<ArrivalBarrier::Phase>(1)};
  if (!running->block->arrivals.try_emplace(place_in_shared_memory(p), fresh).second)
    complain("ARRIVAL BARRIER", "initialised a second time, at " + place(caller));
}

extern "C" void emulator_expect_arrivals(const void* p, unsigned bytes, SourceLine caller) {
  ArrivalBarrier& barrier = barrier_in(*running->block, p, caller);
  const size_t ended = barrier.phases.size() - 1;
  if (barrier.expects || (ended > 0 && !is_known_to_have_ended(barrier.phases[ended - 1]))) {
    complain("ARRIVAL BARRIER", "the previous phase may not have ended, at " + place(caller));
    stop();
  }
  barrier.expects = true;
  barrier.bytes_to_come += bytes;
  try_end_of_phase(*running->block, barrier);
}

extern "C" void emulator_send(unsigned rank, const void* to, uint4 value, const void* p, SourceLine caller) {
  Block& block = started_block(rank);
  ArrivalBarrier& barrier = barrier_in(block, p, caller);
  const size_t number = pieces.size();
  pieces.push_back({&block, place_in_shared_memory(to), value, &barrier, now(Access::kWrite), caller, kOnItsWay});
  check_sent(to, block, arrival_of(number), __builtin_return_address(0));
  on_their_way.push_back(number);
}

// An mbarrier only reports whether the current phase has the other parity. A thread that is woken therefore checks
// again, since more than one phase may have ended in the meantime.
extern "C" void emulator_wait_for_arrivals(const void* p, unsigned parity, SourceLine caller) {
  ArrivalBarrier& barrier = barrier_in(*running->block, p, caller);
  while ((barrier.phases.size() - 1) % 2 == parity) wait_as(State::kAtArrivals, caller);
  if (barrier.phases.size() == 1) return;  // no phase has ended
  ArrivalBarrier::Phase& phase = *(barrier.phases.end() - 2);
  phase.waits.resize(running->block->threads.size());
  Moment& wait = phase.waits[running->number];
  if (wait.block == 0) wait = now(Access::kRead);
  for (const auto& [block, barriers] : phase.senders) learn(running->known, block, barriers);
}

}  // namespace emulator
