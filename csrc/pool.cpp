#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

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

class Pool final {
  public:
    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread& each : threads_) each.join();
    }
    void run(const std::shared_ptr<Loop>& loop, int helpers) {
        {
            std::lock_guard lock(mutex_);
            while (int(threads_.size()) < helpers) threads_.emplace_back([this] { serve(); });
            loop_ = loop, wanted_ = helpers;
        }
        for (int i = 0; i < helpers; i++) wake_.notify_one();
        loop->work();
        loop->wait();
    }

  private:
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
    std::vector<std::thread> threads_;
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
