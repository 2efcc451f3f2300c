#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__) && !defined(__ANDROID__)
#define LOWBIT_PLACES  // threads can be told where to run
#include <pthread.h>
#include <sched.h>
#endif
#if defined(LOWBIT_X86)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

// Looks again and again for what comes soon as a rule: to sleep and to be woken takes as long as a small product. After
// some 5 us whoever looks gives way to any thread that wants the processor, and after some 50 us it sleeps.
template <class Ready>
void look(Ready ready) {
#if defined(LOWBIT_X86)
    for (int i = 0; i < 200 && !ready(); i++) _mm_pause();
#endif
    for (int i = 0; i < 100 && !ready(); i++) std::this_thread::yield();
}

// One loop. It outlives its caller's stack, for a worker may wake when all pieces are taken.
struct Loop {
    int64_t count, piece;
    const std::function<void(int64_t, int64_t)>* body;  // valid while pieces are left
    std::atomic<int64_t> next{0}, left;
    std::mutex mutex;
    std::condition_variable done;

    Loop(int64_t count, int64_t piece, const std::function<void(int64_t, int64_t)>* body)
        : count(count), piece(piece), body(body), left((count + piece - 1) / piece) {}

    void work() {
        for (int64_t first; (first = next.fetch_add(piece)) < count;) {
            (*body)(first, std::min(first + piece, count));
            if (left.fetch_sub(1) == 1) {
                std::lock_guard lock(mutex);
                done.notify_all();
            }
        }
    }
    void wait() {
        auto all_done = [&] { return left.load() == 0; };
        look(all_done);
        std::unique_lock lock(mutex);
        done.wait(lock, all_done);
    }
};

// A thread of the pool, and the processors that it may use. Who sleeps is woken on the processor of whoever wakes it
// where no other looks idle, and in a virtual machine none does that its host has put to sleep: both would share one for
// tens of milliseconds, until loads are balanced. So it may run anywhere but there.
struct Worker {
    std::thread thread;
#if defined(LOWBIT_PLACES)
    cpu_set_t given{}, left{};  // by whoever sets these; less the caller's

    void keep_from(int processor) {
        const pthread_t self = thread.native_handle();
        cpu_set_t now;
        if (processor < 0 || processor >= CPU_SETSIZE || pthread_getaffinity_np(self, sizeof now, &now)) return;
        if (!CPU_EQUAL(&now, &left)) given = now;
        left = given;
        CPU_CLR(processor, &left);
        if (!CPU_COUNT(&left)) left = given;
        pthread_setaffinity_np(self, sizeof left, &left);
    }
    static int processor() { return sched_getcpu(); }
#else
    void keep_from(int) {}
    static int processor() { return -1; }
#endif
};

class Pool final {
  public:
    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (Worker& each : workers_) each.thread.join();
    }
    void run(const std::shared_ptr<Loop>& loop, int helpers) {
        {
            std::lock_guard lock(mutex_);
            clear_way(helpers);
            loop_ = loop, wanted_ = helpers;
        }
        for (int i = 0; i < helpers; i++) wake_.notify_one();
        loop->work();
        loop->wait();
    }

  private:
    void clear_way(int helpers) {
        const int here = Worker::processor();
        for (; int(workers_.size()) < helpers; avoided_ = -1) workers_.push_back({std::thread([this] { serve(); })});
        if (here != avoided_)
            for (Worker& each : workers_) each.keep_from(here);
        avoided_ = here;
    }
    void serve() {
        for (;;) {
            std::shared_ptr<Loop> loop;
            auto called = [&] { return stopping_ || wanted_ > 0; };
            look(called);
            {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, called);
                if (stopping_) return;
                wanted_--;
                loop = loop_;
            }
            loop->work();
        }
    }
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<Worker> workers_;
    int avoided_ = -1;  // the processor that they are kept from
    std::shared_ptr<Loop> loop_;
    std::atomic<int> wanted_{0};
    std::atomic<bool> stopping_{false};
};

}  // namespace

void share(int64_t count, int64_t piece, int threads, const std::function<void(int64_t, int64_t)>& body) {
    int64_t pieces = (count + piece - 1) / piece;
    int helpers = int(std::min<int64_t>(threads, pieces)) - 1;
    if (helpers < 1) {
        if (count > 0) body(0, count);
        return;
    }
    static std::mutex turn;
    static Pool pool;
    std::lock_guard lock(turn);
    pool.run(std::make_shared<Loop>(count, piece, &body), helpers);
}

}  // namespace lowbit
