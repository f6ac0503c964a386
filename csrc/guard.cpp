#include "guard.hpp"

#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <mutex>

namespace olmfast {

namespace {

struct Frame {
  sigjmp_buf back;
  uintptr_t begin, end;
  Frame* outer;
};

// "initial-exec": the handler may run on a thread that never copied anything, and must not allocate there.
__attribute__((tls_model("initial-exec"))) thread_local Frame* volatile innermost = nullptr;
__attribute__((tls_model("initial-exec"))) thread_local volatile bool passing_on = false;

struct sigaction previous;

void die_by_default(int signal_number) {
  struct sigaction usual = {};
  usual.sa_handler = SIG_DFL;
  sigaction(signal_number, &usual, nullptr);
  raise(signal_number);
}

// The fault is not ours. A handler that raises the signal anew comes back here: then the default action.
void pass_on(int signal_number, siginfo_t* info, void* context) {
  if (passing_on) return die_by_default(signal_number);
  passing_on = true;
  if ((previous.sa_flags & SA_SIGINFO) && previous.sa_sigaction) {
    previous.sa_sigaction(signal_number, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal_number);
  } else if (previous.sa_handler == SIG_DFL || info->si_code > 0) {
    die_by_default(signal_number);  // the kernel does not let a process ignore a fault of its own
  }
  passing_on = false;
}

void on_sigbus(int signal_number, siginfo_t* info, void* context) {
  auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (info->si_code > 0) {  // raised by the kernel, so that si_addr is an address
    for (Frame* frame = innermost; frame; frame = frame->outer) {
      if (address >= frame->begin && address < frame->end) siglongjmp(frame->back, 1);
    }
  }
  pass_on(signal_number, info, context);
}

}  // namespace

bool guarded(const void* begin, size_t n_bytes, void (*work)(void*), void* context) {
  Frame frame;
  frame.begin = reinterpret_cast<uintptr_t>(begin);
  frame.end = frame.begin + n_bytes;
  frame.outer = innermost;
  if (sigsetjmp(frame.back, 0)) {  // the mask is not saved: SA_NODEFER leaves it untouched
    innermost = frame.outer;
    return false;
  }
  innermost = &frame;
  work(context);
  innermost = frame.outer;
  return true;
}

void install_guard() {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  struct sigaction current;
  sigaction(SIGBUS, nullptr, &current);
  if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_sigbus) return;
  previous = current;
  struct sigaction ours = {};
  ours.sa_sigaction = on_sigbus;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace olmfast
