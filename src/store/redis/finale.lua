-- What every script ends with that changes the record, or deletes it: then `state` is nil.
if state then
  local header = struct.pack(LAYOUT, 1, state, kind, fingerprint, nonce, fence, attempt, lease, retention, ends, expires)
  local written = redis.pcall('SET', key, header .. answer, 'PXAT', expiry())
  if written.err and not (is_optional and string.find(written.err, 'OOM', 1, true)) then return written end
else
  redis.call('DEL', key)
end
-- Nothing depends on it (waiters poll as well), so a user who may not publish does no harm.
if wakes then redis.pcall('SPUBLISH', key, '') end
return reply
