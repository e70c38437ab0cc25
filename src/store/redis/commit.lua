-- The end of every script that changes the record. If `state` is nil, it deletes the record.
if state then
  local header = struct.pack(LAYOUT, 1, state, kind, fingerprint, nonce, fence, attempt, lease, retention, ends, expires)
  local written = redis.pcall('SET', key, header .. response, 'PXAT', expiry())
  -- A full server refuses the write (OOM). That is harmless if the reply does not need the write.
  if written.err and not (is_optional and string.find(written.err, 'OOM', 1, true)) then return written end
else
  redis.call('DEL', key)
end
-- Waiters poll as well, so it is harmless if the user may not publish.
if wakes then redis.pcall('SPUBLISH', key, '') end
return reply
