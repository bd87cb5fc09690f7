// Stands in for libcupti where there is no GPU: records are handed over as CUPTI does it, through
// the two callbacks, in buffers that the client provides.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef void (*requested_t)(uint8_t **buffer, size_t *size, size_t *max_records);
typedef void (*completed_t)(void *context, uint32_t stream, uint8_t *buffer, size_t size,
                            size_t valid);

enum { SUCCESS = 0, INVALID_PARAMETER = 1, MAX_LIMIT_REACHED = 12, RECORD_BYTES = 216 };

static requested_t requested;
static completed_t completed;
static int refuse;
static uint8_t waiting[4096][RECORD_BYTES];
static size_t count;

void fake_refuse(int yes) { refuse = yes; }

void fake_record(uint32_t kind, uint64_t start, uint64_t end, const char *name) {
    uint8_t *record = waiting[count++];
    memset(record, 0xee, RECORD_BYTES);
    memcpy(record, &kind, sizeof kind);
    memcpy(record + 16, &start, sizeof start);
    memcpy(record + 24, &end, sizeof end);
    memcpy(record + 104, &name, sizeof name);
}

int cuptiActivityRegisterCallbacks(requested_t on_request, completed_t on_complete) {
    requested = on_request;
    completed = on_complete;
    return SUCCESS;
}

int cuptiActivityEnable(uint32_t kind) { return refuse || !kind ? INVALID_PARAMETER : SUCCESS; }

int cuptiGetResultString(int status, const char **text) {
    *text = status == INVALID_PARAMETER ? "CUPTI_ERROR_INVALID_PARAMETER" : "CUPTI_SUCCESS";
    return SUCCESS;
}

int cuptiActivityFlushAll(uint32_t forced) {
    size_t sent = 0;
    while (forced && sent < count) {
        uint8_t *buffer;
        size_t size, max_records;
        requested(&buffer, &size, &max_records);
        size_t fit = size / RECORD_BYTES < 3 ? size / RECORD_BYTES : 3;
        size_t now = count - sent < fit ? count - sent : fit;
        memcpy(buffer, waiting[sent], now * RECORD_BYTES);
        sent += now;
        completed(NULL, 0, buffer, size, now * RECORD_BYTES);
    }
    count = 0;
    return SUCCESS;
}

int cuptiActivityGetNextRecord(uint8_t *buffer, size_t valid, uint8_t **record) {
    uint8_t *next = *record ? *record + RECORD_BYTES : buffer;
    if (next + RECORD_BYTES > buffer + valid) return MAX_LIMIT_REACHED;
    *record = next;
    return SUCCESS;
}
